"""Chooses an implementation of `decode_attention`."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.decode_attention import mosaic_gpu, mosaic_tpu, native_cpu, reference
from pallas_kernels.decode_attention.pages import Pages
from pallas_kernels.decode_attention.rotation import Rotation
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.encoded import Encoded, block_of
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial

_OP = Op(
    "decode_attention",
    reference.decode_attention,
    mosaic_tpu=mosaic_tpu.kernel,
    mosaic_gpu=mosaic_gpu.kernel,
    native_cpu=native_cpu.kernel,
)


def decode_attention(
    q: Float[Array, "B T N H"],
    k: jax.Array | Encoded,
    v: jax.Array | Encoded | None,
    q_pos: Int32[Array, "B T"],
    k_pos: Int32[Array, " B #K S"],
    *,
    bias: Float32[Array, " B #K S"] | None = None,
    k_gain: Float32[Array, " B #K S"] | None = None,
    v_gain: jax.Array | None = None,
    rotation: Rotation | None = None,
    pages: Pages | None = None,
    window: int | None = None,
    scale: Scale | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Softmax attention of T queries over S slots per KV head, as a mergeable part.

    `logit[b, t, n, s] = scale * k_gain[b, n // G, s] * <q[b, t, n], k[b, n // G, s]> + bias[b, n // G, s]` over the
    slots that `pallas_kernels.visibility.visible` admits, and `out = sum_s p_s v_gain_s v_s` with `p = softmax(logit)`.

    Keys and values are arrays, or encoded arrays of any kind, each of its own: `Packed`, `Codes`, `Levels`, or what
    else follows `pallas_kernels.encoded.Encoded`. No more than a tile of slots is ever held decoded. Whatever says
    `K or 1` may have one head that all KV heads read, such as coordinates of all heads together.

    Args:
      q: [B, T, N, H] queries, already rotated. K divides N; G = N / K query heads share a KV head.
      k: [B, K or 1, S, H] keys, already rotated; with a rotation [B, K or 1, S, R], from before it.
      v: [B, K or 1, S, H'] values, or their coordinates: the output is a weighted sum of them. None: what is stored as
        keys is the values, too.
      q_pos: i32[B, T] token positions, -1 for padding.
      k_pos: i32[B, K or 1, S] token positions, -1 for empty slots, where all else must be finite.
      bias: f32[B, K or 1, S] added to the logits: the log of how many tokens a slot stands for. Optional.
      k_gain: f32[B, K or 1, S], what keys are multiplied by, such as norms that are kept apart; inside of a mean.
        Optional.
      v_gain: the same of values.
      rotation: how keys from before the rotation are expanded and rotated when they are read. The rotation stands
        between a query and the coordinates, so queries cannot be projected once for all slots. None: keys are rotated.
      pages: the KV heads that pages of slots belong to; everything else of slots then has one head, [B, 1, S, ...], a
        list of P pages of S / P slots. The work is that of the pages, however unequal the heads are, and a head without
        pages is `(0, -inf)`. None: slots belong to the heads that they are stored by.
      window: tokens a query looks back over, itself included. None: all.
      scale: multiplies the dot products; with a `SoftCap` they are capped then. None: `H ** -0.5`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`; never
        "mosaic_gpu", which was lowered for Hopper GPUs and never run on one.

    Returns:
      `Partial(out f32[B, T, N, H'], lse f32[B, T, N])`.

    Raises:
      ValueError: heads, slots or channels do not fit together.
      NotImplementedError: the implementation asked for does not take these representations or shapes.

    Source: Wang et al., CSKV (2024), for latents from before the rotation; Kwon et al., PagedAttention (2023), and Feng
    et al., Ada-KV (2024), for pages and budgets that differ by head.
    """
    stored = dict(k=k) if v is None else dict(k=k, v=v)
    at = None if rotation is None else rotation.at
    per_slot = {"k_pos": k_pos, "bias": bias, "k_gain": k_gain, "v_gain": v_gain, "rotation.at": at}
    of_slots = stored | {name: x for name, x in per_slot.items() if x is not None}
    S = k_pos.shape[-1]
    for name, x in of_slots.items():
        if len(x.shape) != 3 + (name in stored) or x.shape[2] != S:
            raise ValueError(f"{name} must have slots of [B, K, S] = {list(k_pos.shape)}, got shape {list(x.shape)}.")
    heads = {name: x.shape[1] for name, x in of_slots.items()}
    if pages is not None:
        P, block = pages.owner.shape[1], block_of(*stored.values())
        if set(heads.values()) != {1} or S % P or S // P % block:
            raise ValueError(
                f"pages must be lists of one head, {P} pages of a multiple of {block} slots; got {S} slots and heads "
                f"{heads}."
            )
        heads = {"pages": pages.kv_heads}
    for name in ("basis", "mean"):
        x = None if rotation is None else getattr(rotation, name)
        heads |= {} if x is None else {f"rotation.{name}": x.shape[1 if name == "basis" else -2]}
    K = max(heads.values())
    of_heads = {heads[name] for name in ("pages", "rotation.basis", "rotation.mean") if name in heads}
    if set(heads.values()) - {1, K} or of_heads - {K} or q.shape[2] % K:
        raise ValueError(f"all must have the same KV heads, or one, that divide N = {q.shape[2]}; got {heads}.")
    width = k.shape[3] if rotation is None or rotation.basis is None else rotation.basis.shape[2]
    if S and width != q.shape[3]:
        raise ValueError(f"keys must have the {q.shape[3]} channels of the queries, got {width}.")
    arrays = q, k, v, q_pos, k_pos, bias, k_gain, v_gain, rotation, pages
    return _OP(implementation, *arrays, window=window, scale=scale)
