"""Defines `ragged_decode_attention`: a page is a KV head, and the pages of a head are merged."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.partial import Partial, combine_by_owner, spread_to_owned


def ragged_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    owner: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    only: jax.Array | None = None,
    *,
    kv_heads: int,
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """See `pallas_kernels.ragged_decode_attention.api.ragged_decode_attention`."""
    of_pages = spread_to_owned(q, owner, kv_heads)
    paged = lambda x: None if x is None else x.reshape(*owner.shape, -1, *x.shape[2:])
    partial = decode_attention(
        of_pages, paged(k), paged(v), q_pos, paged(k_pos), paged(bias), window=window, scale=scale
    )
    return combine_by_owner(partial, owner, kv_heads, only=only)
