"""Codes of one bit, or of three states: a sign, or none, times the mean magnitude of a group."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt32

from kvjax.axes import OF_SLOTS, cut_slots
from pallas_kernels.words import WORD_BITS, pack, unpack

_TRITS = 5
"""Channels of a byte: 3 ** 5 = 243."""


@struct.dataclass
class MeanLevels:
    """`x ~ code * mean |x|`, the mean over `group` tokens of a channel, with codes -1, 1 or -1, 0, 1.

    With three states what is within half the mean is 0. Two states lie in words of 32 slots, three in bytes of five
    channels of a slot.

    Bytes, with scales of e bytes: `B * K * S * (H / 8 + e * H / group)`, or with `ceil(H / 5)` for `H / 8`.

    Source: Tao et al., VidKV (2025), arXiv:2503.16257, sections 3.2 and 3.3.
    """

    codes: UInt32[Array, "B K S/32 H"] | None  # or u8[B, K, S, ceil(H / 5)]
    scale: Float[Array, "B K S/group H"] | None
    states: int = struct.field(pytree_node=False)  # 2 or 3
    group: int = struct.field(pytree_node=False)  # tokens
    scale_dtype: str = struct.field(pytree_node=False, default="bfloat16")

    by_slot = False

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return math.lcm(self.group, WORD_BITS) if self.states == 2 else self.group

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        B, K, rows, _ = self.codes.shape
        return B, K, rows * WORD_BITS if self.states == 2 else rows, self.scale.shape[3]

    def for_slots(self, slots: int, block: int | None = None) -> MeanLevels:
        """See `Encoded.for_slots`."""
        return self

    def like(self, x: jax.Array, occupied: jax.Array) -> MeanLevels:
        """See `Encoded.like`."""
        B, K, S, H = x.shape
        x = jnp.where(occupied[..., None], x.astype(jnp.float32), 0.0).reshape(B, K, S // self.group, self.group, H)
        count = jnp.sum(occupied.reshape(B, K, S // self.group, self.group, 1), axis=3)
        mean = (jnp.sum(jnp.abs(x), axis=3) / jnp.maximum(count, 1)).astype(self.scale_dtype)
        low = mean.astype(jnp.float32)[:, :, :, None] / 2
        if self.states == 2:
            return self.replace(codes=pack((x >= 0).astype(jnp.uint32).reshape(B, K, S, H), 1), scale=mean)
        trit = 1 + (x > low).astype(jnp.int32) - (x < -low)
        trit = jnp.pad(trit.reshape(B, K, S, H), (*3 * ((0, 0),), (0, -H % _TRITS)))
        trit = trit.reshape(B, K, S, -(-H // _TRITS), _TRITS)
        return self.replace(codes=jnp.sum(trit * 3 ** jnp.arange(_TRITS), axis=-1).astype(jnp.uint8), scale=mean)

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        B, K, S, H = self.shape
        if self.states == 2:
            code = 2 * unpack(self.codes, 1).astype(jnp.int32) - 1
        else:
            trit = self.codes.astype(jnp.int32)[..., None] // 3 ** jnp.arange(_TRITS) % 3 - 1
            code = trit.reshape(*self.codes.shape[:3], self.codes.shape[3] * _TRITS)[..., :H]
        grouped = code.reshape(B, K, S // self.group, self.group, H) * self.scale.astype(jnp.float32)[:, :, :, None]
        return grouped.reshape(B, K, S, H).astype(dtype)

    def cut(self, start, size) -> MeanLevels:
        """See `Encoded.cut`."""
        return cut_slots(self, self.axes(), self.shape[2], start, size, self.block)

    def axes(self) -> MeanLevels:
        """See `Encoded.axes`."""
        return self.replace(codes=OF_SLOTS, scale=OF_SLOTS)

    def fields(self) -> MeanLevels:
        """See `Encoded.fields`."""
        return self.replace(codes=1 if self.states == 2 else 0, scale=0)

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self, None
