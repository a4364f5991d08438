"""Chooses an implementation of `block_attention`."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.block_attention import mosaic_tpu, reference
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial

_OP = Op("block_attention", reference.block_attention, mosaic_tpu=mosaic_tpu.kernel)


def block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    pos: Int32[Array, "B T"],
    index: Int32[Array, "B N I P"],
    *,
    block: int,
    window: int | None = None,
    scale: Scale | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Computes causal attention of a prompt over some blocks of its keys, as a mergeable part.

    Args:
      q: [B, T, N, H] queries, already rotated; T = I * block.
      k: [B, K, T, H] keys, already rotated.
      v: [B, K, T, H] values.
      pos: i32[B, T] token positions, increasing along T, padding (-1) at the end of the row.
      index: i32[B, N, I, P], blocks of keys, each once, for each of the I blocks of queries of each head; -1, behind
        them: no further one. Only what is there costs time. A block that is not one of the I is read as the last one.
      block: tokens of a block.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products; with a `SoftCap` they are capped then. None: `H ** -0.5`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`.

    Returns:
      `Partial(out f32[B, T, N, H], lse f32[B, T, N])`; a query that sees nothing is `(0, -inf)`.

    Raises:
      ValueError: T is not I blocks.
      NotImplementedError: the implementation asked for does not take these shapes.
    """
    if q.shape[1] != index.shape[2] * block:
        raise ValueError(f"index must be of T / block = {q.shape[1]} / {block} blocks of queries, got {index.shape}.")
    return _OP(implementation, q, k, v, pos, index, block=block, window=window, scale=scale)
