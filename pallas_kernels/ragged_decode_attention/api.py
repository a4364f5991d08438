"""`ragged_decode_attention`: the name by which callers still ask for `decode_attention` over pages."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention import PageRun, Pages, decode_attention
from pallas_kernels.partial import Partial


def ragged_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    owner: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    kv_heads: int,
    bias: jax.Array | None = None,
    run: PageRun | None = None,
    **how,
) -> Partial:
    """`decode_attention` with `Pages(owner, kv_heads, run)`, of k and v [B, S, H], k_pos and bias [B, S]."""
    k, v, k_pos, bias = (None if x is None else x[:, None] for x in (k, v, k_pos, bias))
    return decode_attention(q, k, v, q_pos, k_pos, bias=bias, pages=Pages(owner, kv_heads, run), **how)
