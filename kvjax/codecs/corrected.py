"""Codes with what they miss beside them: outliers taken out before, and a low-rank part of the error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.axes import OF_SLOTS, OF_SLOTS_LAST, cut_slots
from kvjax.codecs.encoded import Encoded, fields_of
from kvjax.codecs.low_rank import Factors, add_product, factorize
from kvjax.codecs.outliers import (
    Outliers,
    add_outliers,
    count_outliers,
    fill_outliers,
    find_outliers,
    take_outliers,
)
from pallas_kernels.quantize_pack import Axis


@struct.dataclass
class Corrected:
    """`x ~ inner + outliers + tokens^T channels`, block by block of tokens.

    Outliers are sought along each channel of a block, or along each token (`axis`). They are replaced by the mean of
    their vector before the rest is encoded, and stored as what the codes then miss. The low-rank part is that of the
    remaining error.

    Bytes, with rank r, numbers of e bytes and n outliers of a vector: those of `inner` and
    `B * K * S * r * e * (1 + H / block)` and `(e + 1) * n * B * K * S * H / block` ("channel") or
    `(e + 1) * n * B * K * S` ("token"), one byte an index up to 256.
    """

    inner: Encoded
    factors: Factors | None
    outliers: Outliers | None
    axis: Axis = struct.field(pytree_node=False)  # of the outliers
    block: int = struct.field(pytree_node=False)  # tokens that share factors, and a channel's outliers; up to 65536
    rank: int = struct.field(pytree_node=False)  # of the factors; 0: none
    loops: int = struct.field(pytree_node=False)  # power iterations
    fraction: float = struct.field(pytree_node=False)  # of a vector's entries, half the largest, half the smallest
    dtype: str = struct.field(pytree_node=False)  # of factors and outliers

    by_slot = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return self.inner.shape

    def for_slots(self, slots: int, block: int | None = None) -> Corrected:
        """See `Encoded.for_slots`."""
        return self.replace(inner=self.inner.for_slots(slots, block))

    def like(self, x: jax.Array, occupied: jax.Array) -> Corrected:
        """See `Encoded.like`."""
        if self.rank > x.shape[3]:
            raise ValueError(f"rank must be at most the {x.shape[3]} channels of a head, got {self.rank}.")
        x, how = x.astype(jnp.float32), dict(axis=self.axis, block=self.block)
        found, filled = None, x
        if self.fraction:
            count = count_outliers(self.fraction, self.block if self.axis == "channel" else x.shape[3])
            found = find_outliers(x, occupied, count, **how)
            filled = fill_outliers(x, occupied, found, **how)
        inner = self.inner.like(filled, occupied)
        missed = jnp.where(occupied[..., None], x - inner.decode(), 0.0)
        outliers = factors = None
        if self.fraction:
            outliers = take_outliers(missed, found, dtype=self.dtype, **how)
            missed = missed - add_outliers(jnp.zeros_like(missed), outliers, **how)
        if self.rank:
            factors = factorize(missed, rank=self.rank, block=self.block, loops=self.loops, dtype=self.dtype)
        return self.replace(inner=inner, factors=factors, outliers=outliers)

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        x = self.inner.decode()
        if self.outliers is not None:
            x = add_outliers(x, self.outliers, axis=self.axis, block=self.block)
        if self.factors is not None:
            x = add_product(x, self.factors, block=self.block)
        return x.astype(dtype)

    def cut(self, start, size) -> Corrected:
        """See `Encoded.cut`."""
        return cut_slots(self, self.axes(), self.shape[2], start, size, self.block)

    def axes(self) -> Corrected:
        """See `Encoded.axes`."""
        along = OF_SLOTS_LAST if self.axis == "token" else OF_SLOTS
        return self.replace(
            inner=self.inner.axes(),
            factors=self.factors and Factors(OF_SLOTS_LAST, OF_SLOTS),
            outliers=self.outliers and Outliers(along, along),
        )

    def fields(self) -> Corrected:
        """See `Encoded.fields`."""
        zero = lambda tree: jax.tree.map(lambda _: 0, tree)
        return self.replace(
            inner=fields_of(self.inner), factors=zero(self.factors), outliers=zero(self.outliers)
        )

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self, None
