"""Attention over a part of the keys, and the one way to merge such parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
    """Softmax attention over some of the slots: `out = sum_s p_s v_s`, `lse = log sum_s exp(logit_s)`.

    `p` is normalised within the part. A query that sees nothing has `out = 0` and `lse = -inf`.
    """

    out: jax.Array  # f32[B, T, N, H]
    lse: jax.Array  # f32[B, T, N]


def combine(partials: Sequence[Partial]) -> Partial:
    """Merges attention over disjoint sets of slots into attention over their union, exactly.

    With `m = max_i lse_i` and `w_i = exp(lse_i - m)`:
    `out = sum_i w_i out_i / sum_i w_i`, `lse = m + log sum_i w_i`.

    Associative and commutative. Serves segments of a layer, split-K inside a kernel, shared prefixes
    and, with collectives in place of the sums, shards of the slot axis.

    Args:
      partials: one or more parts, each `out` f32[B, T, N, H] and `lse` f32[B, T, N].

    Returns:
      The part that covers the union. Where no part sees a slot it is `(0, -inf)`.

    Source: Dao, FlashAttention-2 (2023), section 3.1; Milakov and Gimelshein (2018).
    """
    if not partials:
        raise ValueError("partials must hold at least one Partial, got none.")
    if len(partials) == 1:
        return partials[0]
    m = partials[0].lse
    for p in partials[1:]:
        m = jnp.maximum(m, p.lse)
    m_finite = jnp.where(m == -jnp.inf, 0.0, m)
    weights = [jnp.exp(p.lse - m_finite) for p in partials]
    total = sum(weights[1:], weights[0])
    inverse = 1.0 / jnp.where(total == 0.0, 1.0, total)
    out = sum((w * inverse)[..., None] * p.out for w, p in zip(weights, partials))
    return Partial(out=out, lse=m_finite + jnp.log(total))
