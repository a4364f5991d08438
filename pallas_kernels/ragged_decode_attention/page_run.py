"""A run of pages in every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.partial import Partial, fold


class PageRun(NamedTuple):
    """Pages `first .. first + count - 1` of every row: how many is data."""

    first: jax.Array  # i32[B]
    count: jax.Array  # i32[B]

    def has(self, index: jax.Array) -> jax.Array:
        """bool[B, n]: which of the pages i32[n] or [B, n] are in the run."""
        first, count = self.first[:, None], self.count[:, None]
        return (index >= first) & (index < first + count)

    def fold(self, attend: Callable[[jax.Array, int, jax.Array], Partial], pages: int, tile: int) -> Partial:
        """Merges attention tile by tile, as many tiles as the longest run needs.

        Args:
          attend: `(at i32[B], size, mine bool[B, size]) -> Partial` over pages `at .. at + size - 1` of every row, of
            which those are meant where `mine`.
          pages: [P], in a row.
          tile: pages that are read at a time.
        """
        size = min(tile, pages)

        def read(i):
            at = jnp.minimum(self.first + i * size, pages - size)  # a run at the end begins earlier
            index = at[:, None] + jnp.arange(size)
            return attend(at, size, self.has(index) & (index >= (self.first + i * size)[:, None]))

        return fold(read, -(-jnp.max(self.count) // size))


def cut_rows(x: jax.Array, at: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """`x[b, ..., at[b] : at[b] + size, ...]` of every row, along an axis."""
    if x.shape[0] == 1:
        return jax.lax.dynamic_slice_in_dim(x, at[0], size, axis)
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, size, axis - 1))(x, at)
