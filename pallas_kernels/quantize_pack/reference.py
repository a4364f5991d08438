"""Defines `quantize_pack` and its inverse."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu_tiles import LANES

WORD_BITS = 32


class Packed(NamedTuple):
    """Affine codes of `x[B, K, S, H]`: `x ~ scale * code + zero`, `code` in `[0, 2**bits)`.

    Codes are packed along slots, low bits first: slot `s` is bits `[bits * j, bits * (j + 1))` of word
    `s // per`, `j = s % per`, `per = 32 / bits`. H stays the minor axis. Where it does not fill the 128 lanes of a
    TPU, `in_row` words lie side by side in a row, and scales beside zeros: tiles carry no padding, and no copy in
    another layout is made before a kernel.
    """

    words: jax.Array  # u32[B, K, S * bits / 32 / in_row, in_row * H]
    affine: jax.Array  # scales, then zeros: [B, K, S / group, 2 * H] ("channel") or [B, K, 2 * H / group, S] ("token")

    def channels(self, bits: int, slots: int) -> int:
        """H of the numbers that are packed here in a number of slots."""
        rows, width = self.words.shape[2:]
        return rows * width * (WORD_BITS // bits) // slots if slots else width

    def scale_and_zero(self, axis: str) -> tuple[jax.Array, jax.Array]:
        """The halves of `affine`."""
        return tuple(jnp.split(self.affine, 2, axis=3 if axis == "channel" else 2))


def words_in_row(channels: int, words: int) -> int:
    """How many words of a channel lie side by side, if pieces of `words` words are written and read on their own."""
    return math.gcd(LANES // channels, words) if LANES % channels == 0 else 1


def quantize_pack(x, valid, *, bits, group, axis, scale_dtype, clip=1.0, in_row=1):
    """See `pallas_kernels.quantize_pack.api.quantize_pack`."""
    B, K, S, H = x.shape
    x = x.astype(jnp.float32)
    grouped_shape, reduce_axis = _grouping((B, K, S, H), group, axis)
    grouped = x.reshape(grouped_shape)
    mask = jnp.broadcast_to(valid[..., None], x.shape).reshape(grouped_shape)
    lo = jnp.min(jnp.where(mask, grouped, jnp.inf), axis=reduce_axis)
    hi = jnp.max(jnp.where(mask, grouped, -jnp.inf), axis=reduce_axis)
    scale, zero = affine(lo, hi, bits=bits, scale_dtype=scale_dtype, clip=clip)
    code = nearest_code(grouped, jnp.expand_dims(scale, reduce_axis), jnp.expand_dims(zero, reduce_axis), bits)
    code = code.astype(jnp.uint32)
    code = jnp.where(mask, code, 0).reshape(B, K, S, H)
    if axis == "token":  # [B, K, S, H / group] -> slots minor
        scale, zero = scale.swapaxes(2, 3), zero.swapaxes(2, 3)
    words = pack(code, bits).reshape(B, K, S * bits // WORD_BITS // in_row, in_row * H)
    return Packed(words, jnp.concatenate([scale, zero], axis=3 if axis == "channel" else 2))


def affine(lo: jax.Array, hi: jax.Array, *, bits: int, scale_dtype, clip: float) -> tuple[jax.Array, jax.Array]:
    """The `(scale, zero)` of groups whose entries lie between the float32 `lo` and `hi`; empty ones have `lo > hi`."""
    empty = lo > hi
    lo, hi = jnp.where(empty, 0.0, lo), jnp.where(empty, 0.0, hi)
    if clip < 1:
        cut = (1 - clip) / 2 * (hi - lo)
        lo, hi = lo + cut, hi - cut
    # Half a unit in the last place of scale_dtype, and a little more: rounding to nearest after this
    # step can only land on the far side.
    margin = 0.51 * float(jnp.finfo(scale_dtype).eps)
    zero = (lo - jnp.abs(lo) * margin).astype(scale_dtype)
    span = hi - zero.astype(jnp.float32)
    scale = (span * (1.0 + margin) / (2**bits - 1)).astype(scale_dtype)
    return jnp.where(scale == 0, jnp.ones_like(scale), scale), zero


def nearest_code(x: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    """The code of float32 `x`, as a whole float32 between 0 and `2**bits - 1`."""
    code = (x - zero.astype(jnp.float32)) / scale.astype(jnp.float32)
    return jnp.clip(jnp.round(code), 0, 2**bits - 1)


def dequantize(packed, *, bits, axis, dtype=jnp.float32):
    """See `pallas_kernels.quantize_pack.api.dequantize`."""
    H = packed.affine.shape[3] // 2 if axis == "channel" else packed.channels(bits, packed.affine.shape[3])
    B, K, rows, width = packed.words.shape
    code = unpack(packed.words.reshape(B, K, rows * width // H, H), bits).astype(jnp.float32)
    S = code.shape[2]
    if not S:  # no group says how long it is
        return code.astype(dtype)
    scale, zero = packed.scale_and_zero(axis)
    if axis == "token":
        scale, zero = scale.swapaxes(2, 3), zero.swapaxes(2, 3)
        group = H // scale.shape[3]
    else:
        group = S // scale.shape[2]
    grouped_shape, reduce_axis = _grouping((B, K, S, H), group, axis)
    x = code.reshape(grouped_shape) * jnp.expand_dims(scale.astype(jnp.float32), reduce_axis)
    x = x + jnp.expand_dims(zero.astype(jnp.float32), reduce_axis)
    return x.reshape(B, K, S, H).astype(dtype)


def pack(code: jax.Array, bits: int) -> jax.Array:
    """u32[B, K, S, H] codes below `2**bits` -> u32[B, K, S * bits / 32, H] words, low bits first."""
    B, K, S, H = code.shape
    per = WORD_BITS // bits
    shifts = (jnp.arange(per, dtype=jnp.uint32) * bits)[:, None]
    fields = code.reshape(B, K, S // per, per, H) << shifts
    return jnp.sum(fields, axis=3, dtype=jnp.uint32)  # fields do not overlap: the sum is their union


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`: u32[B, K, S, H] codes."""
    B, K, W, H = words.shape
    per = WORD_BITS // bits
    shifts = (jnp.arange(per, dtype=jnp.uint32) * bits)[:, None]
    return ((words[:, :, :, None] >> shifts) & (2**bits - 1)).reshape(B, K, W * per, H)


def _grouping(shape, group, axis):
    B, K, S, H = shape
    if axis == "channel":
        return (B, K, S // group, group, H), 3
    return (B, K, S, H // group, group), 4
