"""Chooses an implementation of `decode_attention`."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention import mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial

_OP = Op(
    "decode_attention", reference.decode_attention, mosaic_tpu=mosaic_tpu.kernel, mosaic_gpu=mosaic_gpu.kernel
)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    bias: jax.Array | None = None,
    window: int | None = None,
    scale: Scale | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Softmax attention of T queries over S slots per KV head, as a mergeable part.

    `logit[b, t, n, s] = scale * <q[b, t, n], k[b, n // G, s]> + bias[b, n // G, s]` over the slots that
    `pallas_kernels.visibility.visible` admits.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: [B, K, S, H] keys, already rotated. K divides N; G = N / K query heads share a KV head.
      v: [B, K, S, H'] values.
      q_pos: i32[B, T] token positions, -1 for padding.
      k_pos: i32[B, K, S] token positions, -1 for empty slots, whose k and v must be finite.
      bias: f32[B, K, S] added to the logits: the log of how many tokens a slot stands for. Optional.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products; with a `SoftCap` they are capped then. None: `H ** -0.5`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`; never
        "mosaic_gpu", which was lowered for Hopper GPUs and never run on one.

    Returns:
      `Partial(out f32[B, T, N, H'], lse f32[B, T, N])`.

    Raises:
      NotImplementedError: the implementation asked for does not take these shapes.
    """
    return _OP(implementation, q, k, v, q_pos, k_pos, bias, window=window, scale=scale)
