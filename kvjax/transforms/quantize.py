"""Quantizes dense slots into a packed body with an exact tail."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from kvjax.segments import BufferedSegment, DenseSegment, QuantizedSegment, Segment
from kvjax.segments.quantized import fewest_slots
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import PLAIN, Order
from kvjax.transforms.schedule import Schedule
from pallas_kernels.quantize_pack import WORD_BITS, Axis

_IN_ROW = 4
"""Words that fill a row of 32 channels or more."""

Encode = Callable[[DenseSegment], Segment]
"""From dense slots to what stores them packed."""


def quantize(
    bits: int,
    *,
    written_bits: int | None = None,
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
      written_bits: the same for the segments before the last, as `split_slots` makes them; None: `bits`.
      key_group: tokens of a channel that share a key scale, which divide `residual`; with `key_axis="token"`
        channels of a token, which divide the head dimension.
      value_group: channels of a token that share a value scale; divides the head dimension.
      residual: tokens of a block, and the most that are kept exact. A TPU reads heads of fewer than 128 channels as
        they lie if a block has 128 / H words: 32 tokens or more at 2 bits and 64 channels.
      scale_dtype: dtype of scales and zeros.
      key_axis: keys share scales along a "channel" (over tokens), which suits channels that differ in size, or in a
        "token" (over channels), which suits keys that were rotated or mixed.
      clip: fraction of the range of a group that codes span.

    Raises:
      ValueError: bits or groups are impossible (at build), or do not fit the cache (at `init`).
    """
    if written_bits not in (None, 2, 4, 8):
        raise ValueError(f"written_bits must be 2, 4 or 8, got {written_bits}.")
    how = dict(key_group=key_group, value_group=value_group, scale_dtype=scale_dtype, key_axis=key_axis, clip=clip)
    encode = quantizer(bits, block=residual, **how)
    written = quantizer(bits if written_bits is None else written_bits, **how)
    check_block(bits, residual, key_group if key_axis == "channel" else 1)
    return store_in_blocks("quantize", encode, residual, written=written)


def quantizer(
    bits: int,
    *,
    key_group: int,
    value_group: int,
    scale_dtype: str,
    key_axis: Axis = "channel",
    clip: float = 1.0,
    block: int | None = None,
) -> Encode:
    """Packs slots, padded to whole blocks of whole groups and words; see `quantize`.

    Without `block` they are written once: padded to as few slots as can be, and in blocks that fill rows of words.

    Raises:
      ValueError: bits or groups are impossible.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}.")
    if key_axis not in ("channel", "token"):
        raise ValueError(f"key_axis must be 'channel' or 'token', got {key_axis!r}.")
    for name, value in (("key_group", key_group), ("value_group", value_group)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 < clip <= 1:
        raise ValueError(f"clip must be in (0, 1], got {clip}.")
    whole = math.lcm(block or 1, fewest_slots(bits, key_group, key_axis))

    def encode(slots: DenseSegment) -> QuantizedSegment:
        blocks = -(-slots.pos.shape[2] // whole)
        return QuantizedSegment.encode(
            slots.resize(blocks * whole),
            bits=bits,
            key_group=key_group,
            value_group=value_group,
            block=whole * (math.gcd(blocks, _IN_ROW) if block is None else 1),
            scale_dtype=scale_dtype,
            key_axis=key_axis,
            clip=clip,
        )

    return encode


def check_block(bits: int, residual: int, key_group: int, name: str = "residual") -> None:
    """Checks that a block holds whole words of codes and whole groups of tokens.

    Raises:
      ValueError: names `residual`, or what a method calls it, what came and what was expected.
    """
    if residual < 1:
        raise ValueError(f"{name} must be at least 1, got {residual}.")
    if residual % key_group:
        raise ValueError(
            f"key_group must divide {name}, so that blocks hold whole groups: got {key_group} and {residual}."
        )
    if residual * bits % WORD_BITS:
        raise ValueError(f"{name} must be a multiple of {WORD_BITS // bits} for {bits}-bit words, got {residual}.")


def store_in_blocks(name: str, encode: Encode, residual: int, *, written: Encode | None = None) -> CacheTransform:
    """Encodes each layer's last segment block by block and the segments before it as a whole.

    Args:
      name: of the transform.
      encode: packs whole blocks of the last segment.
      residual: tokens of a block, and the most that are kept exact.
      written: packs the segments before it; None: `encode`.
    """
    whole = written or encode

    buffer = lambda dense: BufferedSegment.from_dense(dense, encode, residual)
    of_layer = jax.jit(lambda layer: layer.map_dense(whole, buffer))
    of_shared = jax.jit(lambda segment: segment.map_dense(whole, whole))

    return CacheTransform(
        init=lambda cache, observation: (cache.map_layers(of_layer).map_shared(of_shared), ()),
        schedule=Schedule(
            acts_in=(),
            name=name,
            order=Order(
                (*PLAIN, "paged", "projected", "joint", "pruned", "split", "shared", "tiered"), leaves="packed"
            ),
        ),
    )
