"""A trained gate says which tokens of a prompt may pass into the cache."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kvjax.observation import LayerObservation
from kvjax.segments.segment import Segment, unrotated
from kvjax.segments.slots import without_rounding
from kvjax.transforms.evict import Scorer
from pallas_kernels.decode_attention import decode_attention

_BLOCK = 512  # tokens that look at the whole prompt at a time


def attention_gate() -> Scorer:
    """Probability that a trained gate of the layer lets a token pass, in every head of its own; see `gate_logits`.

    It reads every token of the prompt in all heads: it must come before anything that drops tokens. The gate is
    `LayerObservation.learned`, see `kvjax.transforms.learned`.

    Source: Zeng et al., In-context KV-Cache Eviction for LLMs via Attention-Gate (2024), arXiv:2410.12876.
    """

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        segment.values_apart("attention_gate")
        return without_rounding(jax.nn.sigmoid(gate_logits(seen.learned, unrotated(segment, seen.queries.rope))))

    return Scorer(score=score)


def gate_logits(gate: Mapping[str, jax.Array], slots: Segment) -> jax.Array:
    """`silu(o + z_v) out + bias`, f32[B, K, S], where o is what attention from each token to all tokens reads.

    `x_t` are a token's keys and values in all heads, each of the two divided by its root mean square; `z_q`, `z_k` and
    `z_v` are `x qkv`, split into A heads; `o_t = softmax_s(<z_q_t, z_k_s> / sqrt(C)) z_v_s`. There are no positions and
    no causal order. No matrix of all pairs is held.

    Args:
      gate: `qkv` f32[2, K, H, 3, A, C], `out` f32[A, C, K] and `bias` f32[K].
      slots: un-rotated, a token in the same slot of every head.
    """
    there = slots.pos[:, 0] >= 0  # [B, S]
    parts = [x.astype(jnp.float32) for x in (slots.k, slots.v)]
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, axis=(1, 3), keepdims=True) + 1e-6)
    z = sum(jnp.einsum("bksh,khiac->ibsac", norm(x), w) for x, w in zip(parts, gate["qkv"]))
    q, k, v = z[0], z[1].swapaxes(1, 2), z[2].swapaxes(1, 2)
    B, S, A, C = q.shape
    pos = jnp.broadcast_to(jnp.where(there, 0, -1)[:, None], (B, A, S))
    size = min(_BLOCK, S)
    blocks = -(-S // size)
    padded = jnp.pad(q, ((0, 0), (0, blocks * size - S), (0, 0), (0, 0))).reshape(B, blocks, size, A, C)
    # The reference, which any compiler splits over a mesh: a kernel would have to be told how.
    look = lambda q: decode_attention(q, k, v, jnp.zeros(q.shape[:2], jnp.int32), pos, implementation="xla").out
    o = jax.lax.map(look, padded.swapaxes(0, 1)).swapaxes(0, 1).reshape(B, blocks * size, A, C)[:, :S]
    return jnp.einsum("bsac,ack->bks", jax.nn.silu(o + z[2]), gate["out"]) + gate["bias"][:, None]
