"""Chooses an implementation of `quantized_decode_attention`."""

from __future__ import annotations

import jax

from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Packed
from pallas_kernels.quantize_pack.api import Axis
from pallas_kernels.quantized_decode_attention import reference


def quantized_decode_attention(
    q: jax.Array,
    k: Packed,
    v: Packed,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    bits: int,
    key_axis: Axis = "channel",
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """`decode_attention` over keys quantized per channel or per token and values quantized per token.

    Only a tile of slots is ever held dequantized.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: keys, packed with `axis=key_axis`.
      v: values, packed with `axis="token"`.
      q_pos: i32[B, T] token positions, -1 for padding.
      k_pos: i32[B, K, S] token positions, -1 for empty slots.
      bits: of `k` and `v`.
      key_axis: "channel" (KIVI) or "token".
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products. None: `H ** -0.5`.

    Returns:
      `Partial(out f32[B, T, N, H], lse f32[B, T, N])`.
    """
    return reference.quantized_decode_attention(
        q, k, v, q_pos, k_pos, bits=bits, key_axis=key_axis, window=window, scale=scale
    )
