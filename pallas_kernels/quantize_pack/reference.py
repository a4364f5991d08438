"""Defines `quantize_pack`, and what its codes stand for."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.encoded import cut_slots
from pallas_kernels.words import WORD_BITS, pack_planes, planes, unpack_planes

Axis = Literal["channel", "token"]


@struct.dataclass
class Packed:
    """Affine codes of `x[B, K, S, H]`: `x ~ scale * code + zero`, `code` in `[0, 2**bits)`. See `Encoded`.

    Codes are packed along slots, low bits first: slot `s` is bits `[bits * j, bits * (j + 1))` of word
    `s // per`, `j = s % per`, `per = 32 / bits`. H stays the minor axis. Where it does not fill the 128 lanes of a
    TPU, `in_row` words lie side by side in a row, and scales beside zeros: tiles carry no padding, and no copy in
    another layout is made before a kernel. Codes of 3 bits are planes of 2 and 1.
    """

    words: jax.Array  # u32[B, K, S * bits / 32 / in_row, in_row * H]; of 3 bits the lower 2
    affine: jax.Array  # scales, then zeros: [B, K, S / group, 2 * H] ("channel") or [B, K, 2 * H / group, S] ("token")
    bits: int = struct.field(pytree_node=False)  # 2, 3, 4 or 8
    axis: Axis = struct.field(pytree_node=False)  # along which entries share a scale: see `quantize_pack`
    high: jax.Array | None = None  # u32[B, K, S / 32 / in_row, in_row * H]: the third of 3 bits

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, K, S, H)`; without slots H is the width of the words' rows."""
        B, K, rows, width = self.words.shape
        count = rows * width * (WORD_BITS // planes(self.bits)[0])
        if self.axis == "channel":
            H = self.affine.shape[3] // 2
            return B, K, count // H, H
        S = self.affine.shape[3]
        return B, K, S, count // S if S else width

    @property
    def planes(self) -> tuple[jax.Array, ...]:
        """Words of the low bits and, of 3, of the high one."""
        return (self.words,) if self.high is None else (self.words, self.high)

    @property
    def in_row(self) -> int:
        """Words of a channel that lie side by side."""
        return self.words.shape[3] // self.shape[3]

    @property
    def group(self) -> int:
        """Entries that share a scale: slots of a channel, or channels of a slot."""
        if self.axis == "channel":
            return self.shape[2] // self.affine.shape[2] if self.affine.shape[2] else 1
        return 2 * self.shape[3] // self.affine.shape[2]

    @property
    def block(self) -> int:
        """Slots of whole rows of words and, with scales per channel, of whole groups."""
        return math.lcm(WORD_BITS // min(planes(self.bits)) * self.in_row, self.group if self.axis == "channel" else 1)

    def cut(self, start: jax.Array | int, size: int) -> Packed:
        """See `Encoded.cut`."""
        of_row = [WORD_BITS // width * self.in_row for width in planes(self.bits)]  # slots
        of_scale, axis = (self.group, 2) if self.axis == "channel" else (1, 3)
        words, *high = (cut_slots(x, start // n, size // n) for x, n in zip(self.planes, of_row, strict=True))
        return self.replace(
            words=words,
            affine=cut_slots(self.affine, start // of_scale, size // of_scale, axis=axis),
            high=high[0] if high else None,
        )

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """`scale * code + zero`, computed in float32."""
        B, K, S, H = self.shape
        words = [x.reshape(B, K, -1, H) for x in self.planes]
        code = unpack_planes(words, self.bits, H).astype(jnp.float32)
        if not S:  # no group says how long it is
            return code.astype(dtype)
        scale, zero = self.scale_and_zero()
        if self.axis == "token":
            scale, zero = scale.swapaxes(2, 3), zero.swapaxes(2, 3)
        grouped_shape, reduce_axis = _grouping((B, K, S, H), self.group, self.axis)
        x = code.reshape(grouped_shape) * jnp.expand_dims(scale.astype(jnp.float32), reduce_axis)
        x = x + jnp.expand_dims(zero.astype(jnp.float32), reduce_axis)
        return x.reshape(B, K, S, H).astype(dtype)

    def scale_and_zero(self) -> tuple[jax.Array, jax.Array]:
        """The halves of `affine`."""
        return tuple(jnp.split(self.affine, 2, axis=3 if self.axis == "channel" else 2))


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
    words, *high = (x.reshape(B, K, x.shape[2] // in_row, in_row * H) for x in pack_planes(code, bits))
    both = jnp.concatenate([scale, zero], axis=3 if axis == "channel" else 2)
    return Packed(words, both, bits, axis, high[0] if high else None)


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


def _grouping(shape, group, axis):
    B, K, S, H = shape
    if axis == "channel":
        return (B, K, S // group, group, H), 3
    return (B, K, S, H // group, group), 4
