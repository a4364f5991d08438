"""What a slot is worth by its key and value alone: scores that look at no query."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.observation import LayerObservation
from kvjax.rope import re_rotate
from kvjax.segments.segment import Segment
from kvjax.segments.slots import ranks, token_order, without_rounding
from kvjax.transforms.evict import Scorer

_BLOCK = 256  # keys that are compared with all others at a time


def lag_relative(lag: int = 128, sinks: int = 4) -> Scorer:
    """Ranks the tokens of a partition by how unevenly they lie in the range that the next partition spans.

    The tokens after the sinks are cut into partitions of `lag`. With `low` and `high` the smallest and the largest
    value of each channel in the next partition, `u = softmax(std((k - low) / (high - low))) + softmax(std((v - low) /
    (high - low)))`, the deviation over channels and unbiased, the softmax over the partition. A token of rank r in its
    partition (0: the lowest u) scores `r / lag`. The last whole partition, what follows it, and everything where there
    are fewer than two partitions score `1 + position`: newer tokens first. A channel without range counts as 0.

    Args:
      lag: tokens of a partition.
      sinks: first tokens, which belong to none; protect them with `sinks=`.

    Source: Liang et al., LagKV (2025), arXiv:2504.04704; kvpress, `LagKVPress`.
    """
    if lag < 1 or sinks < 0:
        raise ValueError(f"lag must be at least 1 token and sinks at least 0, got {lag} and {sinks}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        pos, order = segment.pos, token_order(segment.pos)
        parts = max(pos.shape[2] - sinks, 0) // lag
        newer_first = 1.0 + pos
        if parts < 2:
            return newer_first
        part = order[:, :, sinks : sinks + parts * lag]

        def lagged(x):
            x = jnp.take_along_axis(x, part[..., None], axis=2).astype(jnp.float32)
            x = x.reshape(*x.shape[:2], parts, lag, -1)
            own, following = x[:, :, :-1], x[:, :, 1:]
            low, high = (f(following, axis=3, keepdims=True) for f in (jnp.min, jnp.max))
            relative = jnp.where(high > low, (own - low) / jnp.where(high > low, high - low, 1.0), 0.0)
            return jax.nn.softmax(jnp.std(relative, axis=-1, ddof=1), axis=-1)

        uneven = without_rounding(lagged(segment.k) + lagged(segment.values_apart("lag_relative")))
        ranked = (lag - 1.0 - ranks(-uneven)) / lag  # of a tie the older token is worth more
        ranked = ranked.reshape(*pos.shape[:2], -1)
        whole = (jnp.sum(pos >= 0, axis=-1, keepdims=True) - sinks) // lag  # partitions that a row fills
        judged = jnp.arange(ranked.shape[2]) // lag < whole - 1
        newest = jnp.take_along_axis(newer_first, part[:, :, : ranked.shape[2]], axis=2)
        ranked = jnp.where(judged, ranked, newest)
        fill = jnp.take_along_axis(newer_first, order, axis=2)
        ranked = fill.at[:, :, sinks : sinks + ranked.shape[2]].set(ranked)
        return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)

    return Scorer(score=score)


def redundancy(threshold: float = 0.5) -> Scorer:
    """Minus how similar a key is to the others of its head: `-softmax_j(mean_i c[i, j])`.

    `c[i, j] = cos(k_i, k_j)`, 0 for i = j, and 0 where j is the newest token with `c[i, j] > threshold`: of tokens
    that repeat each other the newest is not blamed for it.

    Args:
      threshold: cosine above which two keys are taken for a repetition.

    Source: Cai et al., R-KV (2025), arXiv:2505.24133, section 3.3; its code, `cal_similarity`.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine in [-1, 1], got {threshold}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        occupied, pos = segment.pos >= 0, segment.pos
        k = jnp.where(occupied[..., None], segment.k.astype(jnp.float32), 0.0)
        unit = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
        B, K, S, H = unit.shape
        count = -(-S // _BLOCK)
        blocks = jnp.pad(unit, ((0, 0), (0, 0), (0, count * _BLOCK - S), (0, 0))).reshape(B, K, count, _BLOCK, H)
        own = jnp.arange(count * _BLOCK).reshape(count, _BLOCK)

        def column_sums(total, block):
            rows, index = block
            cosine = jnp.einsum("bkih,bkjh->bkij", rows, unit, precision=jax.lax.Precision.HIGHEST)
            cosine = jnp.where(index[:, None] == jnp.arange(S), 0.0, cosine)
            alike = jnp.where(without_rounding(cosine) > threshold, pos[:, :, None], -1)
            newest = jnp.max(alike, axis=-1, keepdims=True)
            cosine = jnp.where((alike == newest) & (newest >= 0), 0.0, cosine)
            return total + jnp.sum(cosine, axis=2), None

        total, _ = jax.lax.scan(column_sums, jnp.zeros(pos.shape), (jnp.moveaxis(blocks, 2, 0), own))
        mean = total / jnp.maximum(jnp.sum(occupied, axis=-1, keepdims=True), 1)
        return -without_rounding(jax.nn.softmax(jnp.where(occupied, mean, -jnp.inf), axis=-1))

    return Scorer(score=score)


def leverage(sketch: int = 48, sinks: int = 8, seed: int = 0) -> Scorer:
    """How much of the span of a head's keys a key carries by itself: its statistical leverage, from a random sketch.

    With X the un-rotated keys after the sinks, their mean taken off, times a Gaussian matrix of `sketch` columns:
    `s_j = x_j^T (X^T X + e I)^-1 x_j`, `e = 0.01 + 1e-5 mean diag(X^T X)`. Sinks score -inf: protect them.

    Args:
      sketch: columns of the random matrix, one for each layer and head.
      sinks: first tokens, which take no part.
      seed: of the random matrices.

    Source: Chari, Van Durme. Compactor (2025), arXiv:2507.08143; kvpress, `LeverageScorePress`.
    """
    if sketch < 1 or sinks < 0:
        raise ValueError(f"sketch must be at least 1 and sinks at least 0, got {sketch} and {sinks}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        K, H = segment.k.shape[1], segment.k.shape[3]
        k = segment.k.astype(jnp.float32)
        if segment.key_rope == "stored":
            k = re_rotate(k, -segment.pos, seen.queries.rope)
        counted = (segment.pos >= sinks)[..., None]
        count = jnp.maximum(jnp.sum(counted, axis=2, keepdims=True), 1)
        mean = jnp.sum(jnp.where(counted, k, 0.0), axis=2, keepdims=True) / count
        with jax.default_matmul_precision("highest"):
            x = jnp.where(counted, k - mean, 0.0) @ random_sketch(seed, seen.layer, K, H, sketch)
            gram = x.mT @ x  # [B, K, sketch, sketch]
            level = jnp.trace(gram, axis1=2, axis2=3)[..., None, None] / sketch
            factors = jnp.linalg.cholesky(gram + (1e-2 + 1e-5 * level) * jnp.eye(sketch))
            half = jax.scipy.linalg.solve_triangular(factors, x.mT, lower=True)
        return jnp.where(counted[..., 0], without_rounding(jnp.sum(half**2, axis=2)), -jnp.inf)

    return Scorer(score=score)


def random_sketch(seed: int, layer: jax.Array, kv_heads: int, head_dim: int, columns: int) -> jax.Array:
    """Returns f32[K, H, columns], of normal numbers with variance `1 / columns`, the same at every call."""
    key = jax.random.fold_in(jax.random.key(seed), layer)
    return jax.random.normal(key, (kv_heads, head_dim, columns)) / columns**0.5
