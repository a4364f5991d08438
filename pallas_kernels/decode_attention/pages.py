"""Pages that belong to KV heads, and attention over them, or a run of them in every row, as if each were a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.encoded import cut, cut_slots
from pallas_kernels.partial import Partial, combine_by_owner, fold

_TILE = 32  # pages that are read at a time where a run of them is attended to


class PageRun(NamedTuple):
    """Pages `first .. first + count - 1` of every row: how many is data."""

    first: jax.Array  # i32[B]
    count: jax.Array  # i32[B]

    def has(self, index: jax.Array) -> jax.Array:
        """bool[B, n]: which of the pages i32[n] or [B, n] are in the run."""
        first, count = self.first[:, None], self.count[:, None]
        return (index >= first) & (index < first + count)


@struct.dataclass
class Pages:
    """Slots in one list, page after page, each page with the KV head it belongs to."""

    owner: jax.Array  # i32[B, P], in any order
    kv_heads: int = struct.field(pytree_node=False)  # [K]
    run: PageRun | None = None  # the pages that are attended to, whose work it is; None: all


def over_pages(
    attend: Callable[[jax.Array, Callable], Partial], owner: jax.Array, kv_heads: int, run: PageRun | None
) -> Partial:
    """Attends to pages as if each were a KV head, and merges those of a head.

    A run is read tile by tile, as many tiles as the longest needs: the work is that of its pages.

    Args:
      attend: `(owner i32[B, n], cut) -> Partial` of the queries of n pages; `cut(x)` is what these pages have of an
        array, encoded or not, of the slots of all P.
      owner: i32[B, P], the KV head of every page.
      kv_heads: [K].
      run: None: all pages.
    """
    if run is None:
        return combine_by_owner(attend(owner, lambda x: x), owner, kv_heads)
    pages = owner.shape[1]
    size = min(_TILE, pages)

    def read(i):
        start = run.first + i * size
        at = jnp.minimum(start, pages - size)  # a run at the end begins earlier
        index = at[:, None] + jnp.arange(size)
        mine = run.has(index) & (index >= start[:, None])

        def of_pages(x):
            page = x.shape[2] // pages
            return cut(x, at * page, size * page)

        part = cut_slots(owner, at, size, axis=1)
        return combine_by_owner(attend(part, of_pages), part, kv_heads, only=mine)

    return fold(read, -(-jnp.max(run.count) // size))
