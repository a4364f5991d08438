"""Chooses an implementation of `quantized_decode_attention`."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Axis, Packed
from pallas_kernels.quantized_decode_attention import mosaic_gpu, mosaic_tpu, reference

_OP = Op(
    "quantized_decode_attention",
    reference.quantized_decode_attention,
    mosaic_tpu=mosaic_tpu.kernel,
    mosaic_gpu=mosaic_gpu.kernel,
)


def quantized_decode_attention(
    q: jax.Array,
    k: Packed,
    v: Packed | None,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    bits: int,
    bias: jax.Array | None = None,
    key_axis: Axis = "channel",
    window: int | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """`decode_attention` over quantized keys, and values quantized per token.

    Only a tile of slots is ever held dequantized.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: keys, packed with `axis=key_axis`.
      v: values, packed with `axis="token"`. None: the keys are the values.
      q_pos: i32[B, T] token positions, -1 for padding.
      k_pos: i32[B, K, S] token positions, -1 for empty slots.
      bits: of `k` and `v`.
      bias: f32[B, K, S] added to the logits. Optional.
      key_axis: "channel" or "token", what shares a scale with what in the keys.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products. None: `H ** -0.5`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`; never
        "mosaic_gpu", which was lowered for Hopper GPUs and never run on one.

    Returns:
      `Partial(out f32[B, T, N, H], lse f32[B, T, N])`.

    Raises:
      NotImplementedError: the implementation asked for does not take these shapes.
    """
    return _OP(
        implementation, q, k, v, q_pos, k_pos, bias, bits=bits, key_axis=key_axis, window=window, scale=scale
    )
