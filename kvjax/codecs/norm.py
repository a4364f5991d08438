"""A number for every slot, kept apart from its vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float32

from kvjax.axes import OF_SLOTS
from kvjax.codecs.encoded import (
    Stored,
    block_of,
    by_slot,
    decode,
    encode_like,
    fields_of,
    is_array,
    leaf_and_gain,
    named_axes,
)
from pallas_kernels.encoded import cut


@struct.dataclass
class Scaled:
    """`gain_s * inner_s`: several layers may read the same vectors, each at lengths of its own.

    Bytes: those of `inner`, and `4 * B * K * S`.
    """

    inner: Stored
    gain: Float32[Array, "B K S"] | None

    @property
    def by_slot(self) -> bool:
        """See `Encoded.by_slot`."""
        return by_slot(self.inner)

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return block_of(self.inner)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return self.inner.shape

    def for_slots(self, slots: int, block: int | None = None) -> Scaled:
        """See `Encoded.for_slots`."""
        return self if is_array(self.inner) else self.replace(inner=self.inner.for_slots(slots, block))

    def like(self, x: jax.Array, occupied: jax.Array) -> Scaled:
        """Refused: which lengths other slots have cannot be told."""
        raise TypeError("slots with lengths of their own are written once; new tokens go to the segment behind them.")

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        return (decode(self.inner, jnp.float32) * self.gain[..., None]).astype(dtype)

    def cut(self, start, size) -> Scaled:
        """See `Encoded.cut`."""
        return self.replace(inner=cut(self.inner, start, size), gain=cut(self.gain, start, size))

    def axes(self) -> Scaled:
        """See `Encoded.axes`."""
        return self.replace(inner=named_axes(self.inner), gain=OF_SLOTS)

    def fields(self) -> Scaled:
        """See `Encoded.fields`."""
        return self.replace(inner=fields_of(self.inner), gain=0)

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        leaf, gain = leaf_and_gain(self.inner)
        return leaf, self.gain if gain is None else gain * self.gain


@struct.dataclass
class UnitNorm(Scaled):
    """`norm_s * inner_s` with `inner_s = x_s / norm_s` and `norm_s = sqrt(mean_c x_sc^2)`.

    For codes whose levels suit numbers of variance one. A vector of zeros has norm 0.
    """

    def like(self, x: jax.Array, occupied: jax.Array) -> UnitNorm:
        """See `Encoded.like`."""
        x = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.mean(x * x, axis=-1))
        unit = x / jnp.where(norm > 0, norm, 1.0)[..., None]
        return self.replace(inner=encode_like(self.inner, unit, occupied), gain=norm)
