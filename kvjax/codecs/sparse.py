"""Vectors without their smallest entries: a bitmap and the numbers that are left."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt8

from kvjax.axes import OF_SLOTS, cut_slots


@struct.dataclass
class Sparse:
    """The `H - floor(sparsity * H)` entries of largest magnitude of every vector; the others are 0.

    Of equal ones the first are kept. Slots are written one by one.

    Bytes, with numbers of e bytes: `B * K * S * (ceil(H / 8) + e * (H - floor(sparsity * H)))`.

    Source: Joo et al., Mustafar (2025), arXiv:2505.22913.
    """

    bitmap: UInt8[Array, "B K S ceil(H/8)"] | None
    values: Float[Array, "B K S n"] | None  # in the order of channels
    sparsity: float = struct.field(pytree_node=False)
    channels: int = struct.field(pytree_node=False, default=0)  # [H]; 0 without slots
    dtype: str | None = struct.field(pytree_node=False, default=None)  # of the values; None: as they come

    by_slot, block = True, 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return *self.values.shape[:3], self.channels

    def for_slots(self, slots: int, block: int | None = None) -> Sparse:
        """See `Encoded.for_slots`."""
        return self

    def like(self, x: jax.Array, occupied: jax.Array) -> Sparse:
        """See `Encoded.like`."""
        H = x.shape[3]
        x = jnp.where(occupied[..., None], x, 0)
        index = jax.lax.top_k(jnp.abs(x.astype(jnp.float32)), H - int(self.sparsity * H))[1]
        index = jnp.sort(index, axis=-1)
        kept = jnp.any(index[..., None] == jnp.arange(H), axis=-2)
        bits = jnp.pad(kept, (*3 * ((0, 0),), (0, -H % 8))).reshape(*kept.shape[:3], -(-H // 8), 8)
        bitmap = jnp.sum(bits << jnp.arange(8), axis=-1).astype(jnp.uint8)
        dtype = self.dtype or x.dtype
        values = jnp.take_along_axis(x, index, axis=-1).astype(dtype)
        return self.replace(bitmap=bitmap, values=values, channels=H, dtype=str(jnp.dtype(dtype)))

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        bits = (self.bitmap[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
        kept = bits.reshape(*self.bitmap.shape[:3], self.bitmap.shape[3] * 8)[..., : self.channels] != 0
        nth = jnp.maximum(jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1, 0)
        return jnp.where(kept, jnp.take_along_axis(self.values, nth, axis=-1), 0).astype(dtype)

    def cut(self, start, size) -> Sparse:
        """See `Encoded.cut`."""
        return cut_slots(self, self.axes(), self.shape[2], start, size, 1)

    def axes(self) -> Sparse:
        """See `Encoded.axes`."""
        return self.replace(bitmap=OF_SLOTS, values=OF_SLOTS)

    def fields(self) -> Sparse:
        """See `Encoded.fields`."""
        return self.replace(bitmap=0, values=0)

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self, None
