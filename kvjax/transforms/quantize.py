"""Quantizes dense slots into a packed body with an exact tail."""

from __future__ import annotations

import math

import jax

from kvjax.segments import BufferedSegment, QuantizedSegment
from kvjax.transforms.base import PLAIN, CacheTransform


def quantize(
    bits: int,
    *,
    key_group: int = 32,
    value_group: int = 32,
    residual: int = 32,
    scale_dtype: str = "bfloat16",
) -> CacheTransform:
    """Turns each layer's last, dense segment into a quantized body and a dense tail of `residual` slots.

    Segments before it, which nothing is written to any more, are quantized as a whole. `init` encodes whole
    blocks of `residual` tokens, oldest first, and leaves the remainder in the tail; afterwards the tail flushes
    by itself whenever it fills up.

    Args:
      bits: 2, 4 or 8 per stored number.
      key_group: tokens of a channel that share a key scale; divides `residual`.
      value_group: channels of a token that share a value scale; divides the head dimension.
      residual: tokens of a block, and the most that are kept exact.
      scale_dtype: dtype of scales and zeros.

    Raises:
      ValueError: bits or groups are impossible (at build), or do not fit the cache (at `init`).
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}.")
    for name, value in (("key_group", key_group), ("value_group", value_group), ("residual", residual)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if residual % key_group:
        raise ValueError(
            f"key_group must divide residual, so that blocks hold whole groups: got {key_group} and {residual}."
        )
    if residual * bits % 32:
        raise ValueError(
            f"residual must be a multiple of {32 // bits} for {bits}-bit words, got {residual}."
        )

    def encode(slots):
        whole = math.lcm(key_group, 32 // bits)  # groups and words
        return QuantizedSegment.encode(
            slots.resize(-(-slots.pos.shape[2] // whole) * whole),
            bits=bits,
            key_group=key_group,
            value_group=value_group,
            scale_dtype=scale_dtype,
        )

    buffer = lambda dense: BufferedSegment.from_dense(dense, encode, residual)
    of_layer = jax.jit(lambda layer: layer.map_dense(encode, buffer))
    of_shared = jax.jit(lambda segment: segment.map_dense(encode, encode))

    return CacheTransform(
        init=lambda cache, observation: (cache.map_layers(of_layer).map_shared(of_shared), ()),
        name="quantize",
        takes=(*PLAIN, "paged", "projected", "joint", "pruned", "split", "shared"),
        leaves="packed",
    )
