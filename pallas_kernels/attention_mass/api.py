"""Chooses an implementation of `attention_mass`."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_mass import mosaic_tpu, reference
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.logits import Scale

Reduce = Literal["sum", "max", "squares", "entropy"]
"""What is made of a slot's probabilities: their sum, the largest, the sum of their squares, or `-sum p log p`."""

_OP = Op("attention_mass", reference.attention_mass, mosaic_tpu=mosaic_tpu.kernel)


def attention_mass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    q_pos: Int32[Array, "B T"],
    k_pos: Int32[Array, "B K S"],
    lse: Float32[Array, "B T N"],
    *,
    bias: Float32[Array, "B K S"] | None = None,
    window: int | None = None,
    scale: Scale | None = None,
    reduce: Reduce = "sum",
    implementation: Implementation | None = None,
) -> Float32[Array, "B N S"]:
    """The attention probability that every slot received from the given queries, summed over them.

    `mass[b, n, s] = sum_t p[b, t, n, s]` with `p = exp(logit[b, t, n, s] - lse[b, t, n])`, over the queries that see
    the slot; `reduce` may ask for another summary of them. No [T, S] matrix is kept: queries are taken in blocks.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: [B, K, S, H] keys, already rotated.
      q_pos: i32[B, T]; -1 is padding and gives nothing.
      k_pos: i32[B, K, S]; -1 is an empty slot and receives nothing.
      lse: f32[B, T, N], log-sum-exp of each query's logits over everything it attended to.
      bias: f32[B, K, S] added to the logits. Optional.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products; with a `SoftCap` they are capped then. None: `H ** -0.5`.
      reduce: "sum", "max", "squares" (`sum_t p^2`) or "entropy" (`-sum_t p log p`).
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`.

    Returns:
      f32[B, N, S]; 0 where no query sees the slot.

    Raises:
      ValueError: another `reduce`.
      NotImplementedError: the implementation asked for does not take these shapes.
    """
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce must be one of {', '.join(get_args(Reduce))}, got {reduce!r}.")
    return _OP(implementation, q, k, q_pos, k_pos, lse, bias, window=window, scale=scale, reduce=reduce)
