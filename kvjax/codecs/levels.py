"""Codes of levels: each number is the nearest of a short table, the same for all channels."""

from __future__ import annotations

import functools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kvjax.axes import OF_SLOTS, P
from pallas_kernels import levels
from pallas_kernels.words import WORD_BITS, planes

_FURTHEST = 12.0  # standard deviations, beyond which a float64 has no density left
_ROUNDS = 400  # of the fixed-point iteration; 4 bits change by less than 1e-6 after 200


@struct.dataclass
class Levels:
    """2, 3 or 4 bits a number, slot by slot; 3 bits are planes of 2 and 1.

    Bytes: `B * K * S * H * bits / 8` and the table.
    """

    codes: levels.Levels  # without slots its planes are None
    by_slot = True

    @classmethod
    def gaussian(cls, bits: int) -> Levels:
        """Makes the codec whose levels lose least of standard normal numbers.

        Source: Lloyd, Least Squares Quantization in PCM (1982); Max, Quantizing for Minimum Distortion (1960).

        Raises:
          ValueError: bits are not 2, 3 or 4.
        """
        if bits not in (2, 3, 4):
            raise ValueError(f"bits must be 2, 3 or 4, got {bits}.")
        return cls.of(jnp.asarray(lloyd_max(bits)))

    @classmethod
    def of(cls, table: jax.Array) -> Levels:
        """Makes the codec of levels f32[2 ** bits], rising.

        Raises:
          ValueError: there are not 4, 8 or 16 of them.
        """
        if table.shape not in ((4,), (8,), (16,)):
            raise ValueError(f"table must be of 4, 8 or 16 levels, got shape {list(table.shape)}.")
        return cls(levels.Levels((None,) * len(planes(table.shape[0].bit_length() - 1)), table))

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return WORD_BITS // min(planes(self.codes.bits))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return self.codes.shape

    def for_slots(self, slots: int, block: int | None = None) -> Levels:
        """See `Encoded.for_slots`."""
        return self

    def like(self, x: jax.Array, occupied: jax.Array) -> Levels:
        """See `Encoded.like`."""
        return self.replace(codes=levels.nearest_levels(jnp.where(occupied[..., None], x, 0), self.codes.table))

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        return self.codes.decode(dtype)

    def cut(self, start, size) -> Levels:
        """See `Encoded.cut`."""
        return self.replace(codes=self.codes.cut(start, size))

    def axes(self) -> Levels:
        """See `Encoded.axes`; all shards have the table."""
        return self.replace(codes=self.codes.replace(planes=(OF_SLOTS,) * len(self.codes.planes), table=P()))

    def fields(self) -> Levels:
        """See `Encoded.fields`."""
        return self.replace(codes=self.codes.replace(planes=planes(self.codes.bits), table=0))

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self.codes, None


@functools.cache
def lloyd_max(bits: int) -> np.ndarray:
    """f32[2 ** bits], rising: each level is the mean of the standard normal numbers that are nearest to it."""
    normal = NormalDist()
    count = 2**bits
    levels = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    for _ in range(_ROUNDS):
        edges = [-_FURTHEST, *((levels[1:] + levels[:-1]) / 2), _FURTHEST]
        share = np.diff([normal.cdf(edge) for edge in edges])
        levels = -np.diff([normal.pdf(edge) for edge in edges]) / share
    return np.float32(levels)
