"""Quantizes dense slots into a packed body with an exact tail."""

from __future__ import annotations

import math

import jax

from kvjax.segments import BufferedSegment, QuantizedSegment
from kvjax.transforms.base import PLAIN, CacheTransform
from pallas_kernels.quantize_pack.api import Axis


def quantize(
    bits: int,
    *,
    key_group: int = 32,
    value_group: int = 32,
    residual: int = 32,
    scale_dtype: str = "bfloat16",
    key_axis: Axis = "channel",
    clip: float = 1.0,
) -> CacheTransform:
    """Turns each layer's last, dense segment into a quantized body and a dense tail of `residual` slots.

    Segments before it, which nothing is written to any more, are quantized as a whole. `init` encodes whole
    blocks of `residual` tokens, oldest first, and leaves the remainder in the tail; afterwards the tail flushes
    by itself whenever it fills up.

    Args:
      bits: 2, 4 or 8 per stored number.
      key_group: tokens of a channel that share a key scale, dividing `residual`; with `key_axis="token"`, channels of a
        token that do, dividing the head dimension.
      value_group: channels of a token that share a value scale; divides the head dimension.
      residual: tokens of a block, and the most that are kept exact.
      scale_dtype: dtype of scales and zeros.
      key_axis: "channel" suits keys whose channels differ in size, "token" keys that were rotated or mixed.
      clip: fraction of the range of a group that codes span.

    Raises:
      ValueError: bits or groups are impossible (at build), or do not fit the cache (at `init`).
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}.")
    for name, value in (("key_group", key_group), ("value_group", value_group), ("residual", residual)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if key_axis not in ("channel", "token"):
        raise ValueError(f"key_axis must be 'channel' or 'token', got {key_axis!r}.")
    if not 0 < clip <= 1:
        raise ValueError(f"clip must be in (0, 1], got {clip}.")
    tokens = key_group if key_axis == "channel" else 1  # that only make sense together
    if residual % tokens:
        raise ValueError(
            f"key_group must divide residual, so that blocks hold whole groups: got {key_group} and {residual}."
        )
    if residual * bits % 32:
        raise ValueError(
            f"residual must be a multiple of {32 // bits} for {bits}-bit words, got {residual}."
        )

    def encode(slots):
        whole = math.lcm(tokens, 32 // bits)  # groups and words
        return QuantizedSegment.encode(
            slots.resize(-(-slots.pos.shape[2] // whole) * whole),
            bits=bits,
            key_group=key_group,
            value_group=value_group,
            scale_dtype=scale_dtype,
            key_axis=key_axis,
            clip=clip,
        )

    buffer = lambda dense: BufferedSegment.from_dense(dense, encode, residual)
    of_layer = jax.jit(lambda layer: layer.map_dense(encode, buffer))
    of_shared = jax.jit(lambda segment: segment.map_dense(encode, encode))

    return CacheTransform(
        init=lambda cache, observation: (cache.map_layers(of_layer).map_shared(of_shared), ()),
        name="quantize",
        takes=(*PLAIN, "paged", "projected", "joint", "pruned", "split"),
        leaves="packed",
    )
