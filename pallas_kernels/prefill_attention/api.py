"""Chooses an implementation of `prefill_attention`."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial
from pallas_kernels.prefill_attention import mosaic_tpu, reference

_OP = Op("prefill_attention", reference.prefill_attention, mosaic_tpu=mosaic_tpu.kernel)


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    pos: Int32[Array, "B T"],
    *,
    window: int | None = None,
    scale: Scale | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Causal attention of a chunk of T tokens over itself, as a mergeable part.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: [B, K, T, H] keys, already rotated.
      v: [B, K, T, H] values.
      pos: i32[B, T] token positions, increasing along T, padding (-1) at the end of the row.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products; with a `SoftCap` they are capped then. None: `H ** -0.5`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`.

    Returns:
      `Partial(out f32[B, T, N, H], lse f32[B, T, N])`; padding rows are `(0, -inf)`.

    Raises:
      NotImplementedError: the implementation asked for does not take these shapes.
    """
    return _OP(implementation, q, k, v, pos, window=window, scale=scale)
