"""Some channels in one code, the others in another; and codes of a discrete Fourier transform of channels."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kvjax.axes import cut_slots
from kvjax.codecs.encoded import Encoded


@struct.dataclass
class Halves:
    """The first `fraction` of the channels in one code, the rest in another.

    Bytes: those of both.
    """

    first: Encoded
    rest: Encoded
    fraction: float = struct.field(pytree_node=False)

    @property
    def by_slot(self) -> bool:
        """See `Encoded.by_slot`."""
        return self.first.by_slot and self.rest.by_slot

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return math.lcm(self.first.block, self.rest.block)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return *self.first.shape[:3], self.first.shape[3] + self.rest.shape[3]

    def for_slots(self, slots: int, block: int | None = None) -> Halves:
        """See `Encoded.for_slots`."""
        block = self.rest.block if block is None else block
        return self.replace(first=self.first.for_slots(slots, block), rest=self.rest.for_slots(slots, block))

    def like(self, x: jax.Array, occupied: jax.Array) -> Halves:
        """See `Encoded.like`.

        Raises:
          ValueError: one of the codes would have no channels.
        """
        at = int(self.fraction * x.shape[3])
        if not 0 < at < x.shape[3]:
            raise ValueError(f"fraction must leave channels to both codes of {x.shape[3]}, got {self.fraction}.")
        return self.replace(first=self.first.like(x[..., :at], occupied), rest=self.rest.like(x[..., at:], occupied))

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        return jnp.concatenate([self.first.decode(dtype), self.rest.decode(dtype)], axis=-1)

    def cut(self, start, size) -> Halves:
        """See `Encoded.cut`."""
        return self.replace(first=self.first.cut(start, size), rest=self.rest.cut(start, size))

    def axes(self) -> Halves:
        """See `Encoded.axes`."""
        return self.replace(first=self.first.axes(), rest=self.rest.axes())

    def fields(self) -> Halves:
        """See `Encoded.fields`."""
        return self.replace(first=self.first.fields(), rest=self.rest.fields())

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self, None


@struct.dataclass
class Fourier:
    """A code of `x F`, F the orthonormal real Fourier basis of the channels.

    Bytes: those of `inner`.
    """

    inner: Encoded

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

    def for_slots(self, slots: int, block: int | None = None) -> Fourier:
        """See `Encoded.for_slots`."""
        return self.replace(inner=self.inner.for_slots(slots, block))

    def like(self, x: jax.Array, occupied: jax.Array) -> Fourier:
        """See `Encoded.like`."""
        return self.replace(inner=self.inner.like(jnp.matmul(x.astype(jnp.float32), _fourier(x.shape[3])), occupied))

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        return jnp.matmul(self.inner.decode(), _fourier(self.shape[3]).T).astype(dtype)

    def cut(self, start, size) -> Fourier:
        """See `Encoded.cut`."""
        return cut_slots(self, self.axes(), self.shape[2], start, size, self.block)

    def axes(self) -> Fourier:
        """See `Encoded.axes`."""
        return Fourier(self.inner.axes())

    def fields(self) -> Fourier:
        """See `Encoded.fields`."""
        return Fourier(self.inner.fields())

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self, None


@functools.cache
def _fourier(n: int) -> np.ndarray:
    """f32[n, n], orthonormal columns: cosines and sines of rising frequency."""
    t, columns = np.arange(n), [np.full(n, n**-0.5)]
    for frequency in range(1, n // 2 + 1):
        angle = 2 * np.pi * frequency * t / n
        if 2 * frequency == n:
            columns.append(np.cos(angle) * n**-0.5)
        else:
            columns += [np.cos(angle) * (2 / n) ** 0.5, np.sin(angle) * (2 / n) ** 0.5]
    return np.float32(np.stack(columns, axis=1))
