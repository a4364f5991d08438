"""What a few queries say about a whole prompt: their attention, and which tokens it makes important."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from kvjax.observation import LayerObservation, Needs, newest, take_last
from kvjax.score_wrappers import over_heads
from kvjax.segments.segment import Segment
from kvjax.segments.slots import without_rounding
from kvjax.transforms.evict import Scorer
from pallas_kernels.logits import Scale, capped, factor
from pallas_kernels.visibility import visible


def last_probes(
    q: Float[Array, "B T N H"], pos: Int32[Array, "B T"], count: int
) -> tuple[Float[Array, "B W N H"], Int32[Array, "B W"]]:
    """Takes the last `count` queries of every row, or all where there are fewer; padding is at -1."""
    count = min(count, pos.shape[1])
    return take_last(q, pos, count), take_last(pos, pos, count, fill=-1)


def probe_attention(
    q: Float[Array, "B W N H"],
    q_pos: Int32[Array, "B W"],
    k: Float[Array, "B K S H"],
    k_pos: Int32[Array, "B K S"],
    *,
    window: int | None = None,
    scale: Scale | None = None,
) -> Float32[Array, "B N W S"]:
    """Computes the probabilities of some queries over all slots; those of padding are 0.

    Args:
      q: [B, W, N, H], rotated.
      q_pos: i32[B, W], -1 = padding.
      k: [B, K, S, H], rotated.
      k_pos: i32[B, K, S], or i32[B, 1, S] of all heads.
      window: tokens a query looks back over, itself included; None: all.
      scale: see `pallas_kernels.logits`.
    """
    (B, W, N, H), K = q.shape, k.shape[1]
    q = q.reshape(B, W, K, N // K, H)
    logits = jnp.einsum("bwkgh,bksh->bkgws", q, k, preferred_element_type=jnp.float32) * factor(scale, H)
    seen = visible(q_pos[:, None], k_pos, window)[:, :, None]  # [B, K, 1, W, S]
    logits = jnp.where(seen, capped(logits, scale), -jnp.inf)
    p = jnp.where(jnp.any(seen, axis=-1, keepdims=True), jax.nn.softmax(logits, axis=-1), 0.0)
    return p.reshape(B, N, W, -1)


def mean_per_query(
    p: Float32[Array, "B N W S"], q_pos: Int32[Array, "B W"], k_pos: Int32[Array, "B K S"]
) -> Float32[Array, "B K S"]:
    """Sums what every slot received over a query group, and divides by the queries that could see the slot."""
    B, N, _, S = p.shape
    K = k_pos.shape[1]
    received = jnp.sum(p.reshape(B, K, N // K, -1, S), axis=(2, 3))
    return received / jnp.maximum(jnp.sum(visible(q_pos[:, None], k_pos), axis=2), 1)


def probe_salience(probes: int) -> Scorer:
    """Scores a token by the attention it received from each of the prompt's last queries that could see it.

    The mean over all heads: `s_j = sum_{n, q} p[n, q, j] / |{q >= j}|`, up to a factor. The same for every head.

    Args:
      probes: queries.

    Raises:
      ValueError: probes is below 1.

    Source: He et al., ZipCache (2024), section 4.2; He et al., ZipVL (2024), section 3.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1 query, got {probes}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        seen, how = newest(seen, probes), dict(window=seen.window, scale=seen.scale)
        p = probe_attention(seen.queries.rotated, seen.queries.pos, segment.k, segment.pos, **how)
        return mean_per_query(p, seen.queries.pos, segment.pos)

    return over_heads(Scorer(score=score, needs=Needs(queries=probes), rotated=True))


def important_tokens(
    p: Float32[Array, "B N W S"], q_pos: Int32[Array, "B W"], pos: Int32[Array, "B S"], tau: float
) -> Bool[Array, "B S"]:
    """Marks the most salient tokens of a layer: as many as the largest of them need to hold `tau` of the attention.

    How many: the fewest tokens whose received attention sums to tau of all. Which: those of highest `probe_salience`;
    of equal ones the earliest.

    Args:
      p: f32[B, N, W, S], of `probe_attention`.
      q_pos: i32[B, W].
      pos: i32[B, S], -1 = padding.
      tau: share of the attention; 1.0: every token.
    """
    real = pos >= 0
    if tau >= 1.0:
        return real
    received = jnp.sum(p, axis=(1, 2))
    share = without_rounding(received / jnp.maximum(jnp.sum(received, axis=-1, keepdims=True), 1e-30))
    units = jnp.round(share * 2**24).astype(jnp.int32)  # sums of integers do not depend on how many zeros stand behind
    largest = -jnp.sort(-units, axis=-1)
    before = jnp.cumsum(largest, axis=-1) - largest
    needed = before < (tau * jnp.sum(units, axis=-1, keepdims=True).astype(jnp.float32)).astype(jnp.int32)
    count = jnp.sum(needed & (largest > 0), axis=-1, keepdims=True)
    salience = jnp.mean(mean_per_query(p, q_pos, jnp.broadcast_to(pos[:, None], (p.shape[0], 1, p.shape[3]))), axis=1)
    order = jnp.argsort(jnp.where(real, -without_rounding(salience), jnp.inf), axis=-1, stable=True)
    return (jnp.argsort(order, axis=-1) < count) & real


def ascending(chosen: Bool[Array, "... S"]) -> Int32[Array, "... S"]:
    """Lists the chosen of the last axis in their order, -1 behind them."""
    S = chosen.shape[-1]
    index = jnp.sort(jnp.where(chosen, jnp.arange(S), S), axis=-1)
    return jnp.where(index < S, index, -1).astype(jnp.int32)
