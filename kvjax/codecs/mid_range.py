"""The middle and half the range of every slot's numbers, kept apart from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from kvjax.axes import OF_SLOTS
from kvjax.codecs.encoded import Encoded
from pallas_kernels.encoded import cut


@struct.dataclass
class MidRange:
    """`x ~ middle_s + half_s * inner_s`: numbers between -1 and 1, for levels that span these.

    Bytes: those of `inner`, and `2 * e * B * K * S` with numbers of e bytes.
    """

    inner: Encoded
    middle: Float[Array, "B K S"] | None
    half: Float[Array, "B K S"] | None
    dtype: str = struct.field(pytree_node=False, default="bfloat16")

    @property
    def by_slot(self) -> bool:
        """See `Encoded.by_slot`."""
        return self.inner.by_slot

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return self.inner.block

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return self.inner.shape

    def for_slots(self, slots: int, block: int | None = None) -> MidRange:
        """See `Encoded.for_slots`."""
        return self.replace(inner=self.inner.for_slots(slots, block))

    def like(self, x: jax.Array, occupied: jax.Array) -> MidRange:
        """See `Encoded.like`."""
        x = x.astype(jnp.float32)
        low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)
        middle, half = ((high + low) / 2).astype(self.dtype), ((high - low) / 2).astype(self.dtype)
        half = jnp.where(half > 0, half, jnp.ones_like(half))
        unit = (x - middle.astype(jnp.float32)[..., None]) / half.astype(jnp.float32)[..., None]
        return self.replace(inner=self.inner.like(unit, occupied), middle=middle, half=half)

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        middle, half = (x.astype(jnp.float32)[..., None] for x in (self.middle, self.half))
        return (middle + half * self.inner.decode()).astype(dtype)

    def cut(self, start, size) -> MidRange:
        """See `Encoded.cut`."""
        parts = (cut(x, start, size) for x in (self.middle, self.half))
        return self.replace(inner=self.inner.cut(start, size), **dict(zip(("middle", "half"), parts)))

    def axes(self) -> MidRange:
        """See `Encoded.axes`."""
        return self.replace(inner=self.inner.axes(), middle=OF_SLOTS, half=OF_SLOTS)

    def fields(self) -> MidRange:
        """See `Encoded.fields`."""
        return self.replace(inner=self.inner.fields(), middle=0, half=0)

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self, None
