"""Chooses an implementation of `attention_mass`."""

from __future__ import annotations

import jax

from pallas_kernels.attention_mass import reference


def attention_mass(
    q: jax.Array,
    k: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    lse: jax.Array,
    *,
    bias: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The attention probability that every slot received from the given queries, summed over them.

    `mass[b, n, s] = sum_t exp(logit[b, t, n, s] - lse[b, t, n])` over the queries that see the slot. No
    [T, S] matrix is kept: queries are taken in blocks.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: [B, K, S, H] keys, already rotated.
      q_pos: i32[B, T]; -1 is padding and gives nothing.
      k_pos: i32[B, K, S]; -1 is an empty slot and receives nothing.
      lse: f32[B, T, N], log-sum-exp of each query's logits over everything it attended to.
      bias: f32[B, K, S] added to the logits. Optional.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products. None: `H ** -0.5`.

    Returns:
      f32[B, N, S].
    """
    return reference.attention_mass(q, k, q_pos, k_pos, lse, bias=bias, window=window, scale=scale)
