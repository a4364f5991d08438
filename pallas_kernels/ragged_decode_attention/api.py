"""Chooses an implementation of `ragged_decode_attention`."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.partial import Partial
from pallas_kernels.ragged_decode_attention import mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.ragged_decode_attention.page_run import PageRun

_OP = Op(
    "ragged_decode_attention",
    reference.ragged_decode_attention,
    mosaic_tpu=mosaic_tpu.kernel,
    mosaic_gpu=mosaic_gpu.kernel,
)


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
    window: int | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """`decode_attention` where a KV head has as many slots as there are pages that name it.

    The work is that of the pages, however unequal the heads are, and a head without pages is `(0, -inf)`.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: [B, S, H] keys, already rotated: P pages of S / P slots, one after the other.
      v: [B, S, H'] values.
      owner: i32[B, P], the KV head of every page, in any order.
      q_pos: i32[B, T] token positions, -1 for padding.
      k_pos: i32[B, S] token positions, -1 for empty slots.
      kv_heads: [K].
      bias: f32[B, S] added to the logits. Optional.
      run: the pages to attend to; the work is theirs. None: all.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products. None: `H ** -0.5`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`; never
        "mosaic_gpu", which was lowered for Hopper GPUs and never run on one.

    Returns:
      `Partial(out f32[B, T, N, H'], lse f32[B, T, N])`.

    Raises:
      NotImplementedError: the implementation asked for does not take these shapes.

    Source: Kwon et al., PagedAttention (2023); Feng et al., Ada-KV (2024), for budgets that differ by head.
    """
    return _OP(
        implementation, q, k, v, owner, q_pos, k_pos, bias, run, kv_heads=kv_heads, window=window, scale=scale
    )
