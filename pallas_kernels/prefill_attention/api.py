"""Chooses an implementation of `prefill_attention`."""

from __future__ import annotations

import jax

from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial
from pallas_kernels.prefill_attention import reference


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pos: jax.Array,
    *,
    window: int | None = None,
    scale: Scale | None = None,
) -> Partial:
    """Causal attention of a chunk of T tokens over itself, as a mergeable part.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: [B, K, T, H] keys, already rotated.
      v: [B, K, T, H] values.
      pos: i32[B, T] token positions, increasing along T, padding (-1) at the end of the row.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products; with a `SoftCap` they are capped then. None: `H ** -0.5`.

    Returns:
      `Partial(out f32[B, T, N, H], lse f32[B, T, N])`; padding rows are `(0, -inf)`.
    """
    return reference.prefill_attention(q, k, v, pos, window=window, scale=scale)
