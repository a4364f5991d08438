"""Chooses an implementation of `lowrank_decode_attention`."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.lowrank_decode_attention import mosaic_tpu, reference
from pallas_kernels.partial import Partial

_OP = Op("lowrank_decode_attention", reference.lowrank_decode_attention, mosaic_tpu=mosaic_tpu.kernel)


def lowrank_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    basis: jax.Array | None,
    inv_freq: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    mean: jax.Array | None = None,
    bias: jax.Array | None = None,
    at: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """`decode_attention` over keys `rotate(basis k + mean)`, of which no more than a tile of slots ever exists.

    The rotation stands between a query and the coordinates, so queries cannot be projected once for all slots; what
    is stored after the rotation is read with `decode_attention` and projected queries.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: [B, K, S, R] coordinates of un-rotated keys, or [B, 1, S, R] that all KV heads read.
      v: [B, K or 1, S, H'] values, or their coordinates: the output is a weighted sum of them.
      basis: [1 or B, K, H, R]. None: k are the un-rotated keys themselves, R = H.
      inv_freq: f32[H / 2], radians per token of the rotation.
      q_pos: i32[B, T] token positions, -1 for padding.
      k_pos: i32[B, K or 1, S] token positions, -1 for empty slots.
      mean: [K, H] added to the keys before they are rotated. Optional.
      bias: f32[B, K or 1, S] added to the logits. Optional.
      at: i32[B, K or 1, S], what keys are rotated by in place of their tokens' positions. Optional.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products. None: `H ** -0.5`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`.

    Returns:
      `Partial(out f32[B, T, N, H'], lse f32[B, T, N])`.

    Raises:
      NotImplementedError: the implementation asked for does not take these shapes.

    Source: Wang et al., CSKV (2024), for latents from before the rotation.
    """
    return _OP(implementation, q, k, v, basis, inv_freq, q_pos, k_pos, mean, bias, at, window=window, scale=scale)
