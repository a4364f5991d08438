"""Defines `ragged_decode_attention`: a page is a KV head, and the pages of a head are merged."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.partial import Partial, spread_to_owned
from pallas_kernels.ragged_decode_attention.page_run import PageRun, over_pages


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
    page = k.shape[1] // owner.shape[1]

    def attend(owner, cut):
        paged = lambda x: None if x is None else cut(x).reshape(*owner.shape, page, *x.shape[2:])
        of_pages = spread_to_owned(q, owner, kv_heads)
        how = dict(window=window, scale=scale)
        return decode_attention(of_pages, paged(k), paged(v), q_pos, paged(k_pos), paged(bias), **how)

    return over_pages(attend, owner, kv_heads, run)
