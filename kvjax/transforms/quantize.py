"""Stores slots as affine codes: in blocks behind an exact tail, or one by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from kvjax.cache import Cache
from kvjax.codecs import Affine, Stored
from kvjax.observation import Observation
from kvjax.segments import AnySegment, BlockedSegment, Segment
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule
from pallas_kernels.quantize_pack import WORD_BITS, Axis
from pallas_kernels.words import planes

Encode = Callable[[Segment], AnySegment]
"""From dense slots to what stores them encoded."""


def quantize(
    bits: int,
    *,
    value_bits: int | None = None,
    written_bits: int | None = None,
    key_group: int = 32,
    value_group: int | None = 32,
    residual: int = 32,
    scale_dtype: str = "bfloat16",
    key_axis: Axis = "channel",
    value_axis: Axis = "token",
    clip: float = 1.0,
) -> CacheTransform:
    """Stores keys and values as affine codes, `x ~ scale * code + zero`.

    With a `residual`, slots that tokens are appended to become a quantized body with a dense tail: `init` encodes whole
    blocks of `residual` tokens, oldest first, and leaves the remainder in the tail; afterwards the tail flushes by
    itself whenever it fills up. Segments before it, which nothing is written to any more, are quantized as a whole.

    With `residual=0`, and in rings with any, every slot is quantized by itself when it is written, keys too with scales
    over channels: so slots may be overwritten, and evicted at every step. Where a few channels of all keys are large,
    such groups lose the others: with two of 64 channels at 300, 8 bits still tell which key a query is aligned with, 4
    bits do not (`quantize_levels` after `rotate_channels`, or blocks, do).

    Args:
      bits: 2, 3, 4 or 8 per stored number of a key; kernels read 2, 4 and 8 as they lie.
      value_bits: the same for values; None: `bits`.
      written_bits: the same for the segments before the last, as `split_slots` makes them; None: as the last.
      key_group: tokens of a channel that share a key scale, which divide `residual`; with `key_axis="token"`
        channels of a token, which divide the head dimension.
      value_group: channels of a token that share a value scale, which divide the head dimension (None: all of them);
        with `value_axis="channel"` tokens of a channel, which divide `residual`. Slots that are quantized one by one
        have groups of as many channels, or of all where they divide into no such groups.
      residual: tokens of a block, and the most that are kept exact; 0: none. A TPU reads heads of fewer than 128
        channels as they lie if a block has 128 / H words: 32 tokens or more at 2 bits and 64 channels.
      scale_dtype: dtype of scales and zeros.
      key_axis: keys share scales along a "channel" (over tokens), which suits channels that differ in size, or in a
        "token" (over channels), which suits keys that were rotated or mixed.
      value_axis: the same for values; coordinates in a basis differ in size as key channels do.
      clip: fraction of the range of a group that codes span.

    Raises:
      ValueError: bits or groups are impossible (at build), or do not fit the cache (at `init`).
    """
    value_bits = bits if value_bits is None else value_bits
    for name, value in (("bits", bits), ("value_bits", value_bits), ("written_bits", written_bits)):
        if value not in (2, 3, 4, 8) and (name, value) != ("written_bits", None):
            raise ValueError(f"{name} must be 2, 3, 4 or 8, got {value}.")
    groups = (("key_group", key_group, key_axis), ("value_group", value_group, value_axis))
    for name, value, axis in groups:
        if value is None and axis == "channel":
            raise ValueError(f"{name} must say how many tokens share a scale, got None.")
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if not isinstance(residual, int) or residual < 0:
        raise ValueError(f"residual must be a whole number of tokens of at least 0, got {residual!r}.")
    if scale_dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"scale_dtype must be 'bfloat16', 'float16' or 'float32', got {scale_dtype!r}.")
    axes = (("key_axis", key_axis), ("value_axis", value_axis))
    for name, axis in axes:
        if axis not in ("channel", "token"):
            raise ValueError(f"{name} must be 'channel' or 'token', got {axis!r}.")
    if not 0 < clip <= 1:
        raise ValueError(f"clip must be in (0, 1], got {clip}.")
    over_tokens = [f"{name}='channel'" for name, axis in axes if axis == "channel"]
    if residual == 0 and over_tokens:
        raise ValueError(
            f"residual must be at least 1 where scales are shared over tokens ({', '.join(over_tokens)}): slots that "
            "are quantized one by one have scales over channels, axis 'token'."
        )
    how = dict(scale_dtype=scale_dtype, clip=clip)
    groups = (key_group, key_axis), (value_group, value_axis)

    def blocks(bits: int, value_bits: int, block: int | None) -> tuple[Affine, Affine]:
        return tuple(Affine.of_blocks(b, *group, block=block, **how) for b, group in zip((bits, value_bits), groups))

    one_by_one = tuple(Affine.of_slots(b, group, **how) for b, (group, _) in zip((bits, value_bits), groups))
    written = blocks(*(2 * (written_bits,) if written_bits else (bits, value_bits)), None)
    narrowest = min((bits, value_bits), key=lambda width: min(planes(width)))  # has the longest words
    if residual:
        for name, (group, axis) in zip(("key_group", "value_group"), groups):
            check_block(narrowest, residual, group if axis == "channel" else 1, group_name=name)
    body = blocks(bits, value_bits, residual) if residual else None
    return store("quantize", body, residual, written=written, one_by_one=one_by_one)


Codecs = tuple[Stored, Stored]
"""Of the keys, and of the values."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes dense slots, padded to whole blocks; without `block` of as many as fill rows of words."""

    codecs: Codecs
    block: int | None = None  # tokens that are written together

    def in_blocks(self, tokens: int) -> Encoder:
        """Returns the encoder of slots that are written in blocks of so many tokens."""
        return Encoder(self.codecs, tokens)

    def __call__(self, slots: Segment) -> Segment:
        """Returns the slots encoded, without their statistics.

        Raises:
          ValueError: a block holds no whole number of groups and words.
        """
        of = [codec.for_slots(slots.pos.shape[2], self.block) for codec in self.codecs]
        least = math.lcm(*(codec.block for codec in of))
        if self.block is not None and self.block % least:
            raise ValueError(
                f"blocks of {self.block} tokens, which are written together, must hold whole groups and words: "
                f"multiples of {least}."
            )
        return slots.with_slots(stats={}).encoded(*of)


def check_block(
    bits: int, residual: int, group: int, name: str = "residual", *, group_name: str = "key_group"
) -> None:
    """Checks that a block holds whole words of codes and whole groups of tokens.

    Raises:
      ValueError: names `residual`, or what a method calls it, what came and what was expected.
    """
    if residual < 1:
        raise ValueError(f"{name} must be at least 1, got {residual}.")
    if residual % group:
        raise ValueError(
            f"{group_name} must divide {name}, so that blocks hold whole groups: got {group} and {residual}."
        )
    word = WORD_BITS // min(planes(bits))
    if residual % word:
        raise ValueError(f"{name} must be a multiple of {word} for {bits}-bit words, got {residual}.")


class Band(NamedTuple):
    """Blocks between the exact tail and the body, with codes of their own."""

    codecs: Codecs
    blocks: int  # the most that it holds of a row and head


def store(
    name: str,
    body: Codecs | None,
    residual: int,
    *,
    bands: Sequence[Band] = (),
    written: Codecs | None = None,
    one_by_one: Codecs | None = None,
) -> CacheTransform:
    """Encodes each layer's last segment, block by block or slot by slot, and the segments before it as a whole.

    Args:
      name: of the transform.
      body: of whole blocks of slots that tokens are appended to; None: these are encoded one by one.
      residual: tokens of a block, and the most that are kept exact.
      bands: blocks that are younger than those of the body, from the newest on; what leaves one goes to the next.
      written: of segments that nothing is written to any more; None: `body`.
      one_by_one: of slots that are overwritten or dropped by themselves; None: there is no such code, and rings stay as
        they are.
    """
    whole = Encoder(written or body)

    def appended(slots: Segment) -> AnySegment:
        if body is not None and slots.layout.grows:
            younger = [(Encoder(band.codecs), band.blocks) for band in bands]
            return BlockedSegment.from_dense(slots, Encoder(body), residual, younger)
        return slots if one_by_one is None else slots.encoded(*one_by_one)

    of_layer = jax.jit(lambda layer: layer.map_dense(whole, appended))
    of_shared = jax.jit(lambda segment: segment.map_dense(whole, whole))
    order = Order.of(
        needs="numbers" if one_by_one else "numbers room",
        loses="numbers vectors whole slots" if body else "numbers vectors whole",
    )

    def init(cache: Cache, observation: Observation):
        if observation.phase == "begin":  # what still acts on slots while the prompt arrives has them exact
            return cache, ()
        return cache.map_layers(of_layer).map_shared(of_shared), ()

    on_ring = (lambda layer, seen: of_layer(layer)) if one_by_one else None
    return CacheTransform(init, schedule=Schedule(acts_in=(), begins=True, name=name, order=order, on_ring=on_ring))
