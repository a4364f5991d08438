"""Defines `ragged_decode_attention`: a page is a KV head, and the pages of a head are merged."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.partial import Partial, combine_by_owner, spread_to_owned
from pallas_kernels.ragged_decode_attention.page_run import PageRun, cut_rows

TILE = 32  # pages that are read at a time where a run of them is attended to


def ragged_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    owner: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    run: PageRun | None = None,
    *,
    kv_heads: int,
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """See `pallas_kernels.ragged_decode_attention.api.ragged_decode_attention`."""
    P, page = owner.shape[1], k.shape[1] // owner.shape[1]

    def attend(k, v, owner, k_pos, bias, mine=None):
        paged = lambda x: None if x is None else x.reshape(*owner.shape, page, *x.shape[2:])
        of_pages = spread_to_owned(q, owner, kv_heads)
        how = dict(window=window, scale=scale)
        partial = decode_attention(of_pages, paged(k), paged(v), q_pos, paged(k_pos), paged(bias), **how)
        return combine_by_owner(partial, owner, kv_heads, only=mine)

    if run is None:
        return attend(k, v, owner, k_pos, bias)

    def attend_to_tile(at, size, mine):
        of_slots = lambda x: None if x is None else cut_rows(x, at * page, size * page)
        return attend(of_slots(k), of_slots(v), cut_rows(owner, at, size), of_slots(k_pos), of_slots(bias), mine)

    return run.fold(attend_to_tile, P, TILE)
