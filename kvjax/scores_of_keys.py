"""What a slot is worth by its key and value alone: scores that look at no query."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.observation import LayerObservation
from kvjax.segments.dense import DenseSegment
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

    def score(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
        pos, order = segment.pos, token_order(segment.pos)
        S, parts = pos.shape[2], max(pos.shape[2] - sinks, 0) // lag
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

    def score(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
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
