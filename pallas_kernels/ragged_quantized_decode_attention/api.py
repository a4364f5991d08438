"""Chooses an implementation of `ragged_quantized_decode_attention`."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Axis, Packed
from pallas_kernels.ragged_decode_attention import PageRun
from pallas_kernels.ragged_quantized_decode_attention import mosaic_tpu, reference

_OP = Op(
    "ragged_quantized_decode_attention",
    reference.ragged_quantized_decode_attention,
    mosaic_tpu=mosaic_tpu.kernel,
)


def ragged_quantized_decode_attention(
    q: jax.Array,
    k: Packed,
    v: Packed,
    owner: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    kv_heads: int,
    bits: int,
    key_axis: Axis = "channel",
    bias: jax.Array | None = None,
    run: PageRun | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """`ragged_decode_attention` over pages whose keys and values are packed.

    Args:
      q: [B, T, N, H] queries, already rotated.
      k: keys [B, 1, S, H], packed with `axis=key_axis`: P pages of S / P slots, one after the other, each of whole rows
        of words and whole groups.
      v: values, packed alike with `axis="token"`.
      owner: i32[B, P], the KV head of every page, in any order.
      q_pos: i32[B, T] token positions, -1 for padding.
      k_pos: i32[B, S] token positions, -1 for empty slots.
      kv_heads: [K].
      bits: of `k` and `v`.
      key_axis: "channel" or "token", what shares a scale with what in the keys.
      bias: f32[B, S] added to the logits. Optional.
      run: the pages to attend to; the work is theirs. None: all.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products. None: `H ** -0.5`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`.

    Returns:
      `Partial(out f32[B, T, N, H'], lse f32[B, T, N])`.

    Raises:
      NotImplementedError: the implementation asked for does not take these shapes.
    """
    how = dict(kv_heads=kv_heads, bits=bits, key_axis=key_axis, window=window, scale=scale)
    return _OP(implementation, q, k, v, owner, q_pos, k_pos, bias, run, **how)
