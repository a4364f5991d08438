"""Scorers made of other scorers: blends of several, one score for all heads or a block of tokens, two stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kvjax.observation import ALL, LayerObservation, Needs, quota_of
from kvjax.segments.segment import Segment
from kvjax.segments.slots import highest_first, places, priority, without_rounding
from kvjax.transforms.evict import Scorer

_BLOCK = 64  # slots whose values are projected at a time

Standard = Literal["none", "deviation", "range"]
"""What makes scores comparable: nothing, `(x - mean) / std` (unbiased), or `(x - min) / (max - min)`."""


Anchor = Literal["alternate", "zeros", "ones", "mean"]
"""The signature that those of tokens are compared with."""


def blend(parts: Sequence[tuple[float, Scorer]], standard: Standard = "none") -> Scorer:
    """Returns the weighted sum of several scores.

    Each is first made comparable over all slots of a row's layer whose score is finite; a score without spread is 0.
    A slot that any part scores -inf stays -inf.

    Args:
      parts: weights and scorers.
      standard: "none", "deviation" or "range".

    Raises:
      ValueError: no parts, parts that cannot be joined, or another `standard`.
    """
    if not parts:
        raise ValueError("blend needs at least one pair of a weight and a scorer, got none.")
    if standard not in get_args(Standard):
        raise ValueError(f"standard must be one of {', '.join(get_args(Standard))}, got {standard!r}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        total = 0.0
        for weight, scorer in parts:
            total = total + weight * _standardised(scorer.score(segment, seen), segment.pos >= 0, standard)
        return without_rounding(total)

    return _joined([scorer for _, scorer in parts], score)


def strongest(*scorers: Scorer) -> Scorer:
    """Returns the largest of several scores, each divided by its mean over the slots of its head.

    Args:
      *scorers: scores at least 0.

    Raises:
      ValueError: no scorers, or some that cannot be joined.
    """
    if not scorers:
        raise ValueError("strongest needs at least one scorer, got none.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        occupied = segment.pos >= 0
        count = jnp.maximum(jnp.sum(occupied, axis=-1, keepdims=True), 1)

        def in_means(scorer):
            scores = jnp.where(occupied, scorer.score(segment, seen), 0.0)
            mean = jnp.sum(scores, axis=-1, keepdims=True) / count
            return jnp.where(mean > 0, scores / jnp.where(mean > 0, mean, 1.0), 0.0)

        return jnp.max(jnp.stack([in_means(scorer) for scorer in scorers]), axis=0)

    return _joined(scorers, score)


def over_heads(scorer: Scorer) -> Scorer:
    """Returns the mean of a score over the KV heads of a layer: every head keeps the same tokens.

    A token must lie in the same slot in every head, as it does in a prompt and after transforms that keep it so.
    """

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        mean = jnp.mean(scorer.score(segment, seen), axis=1, keepdims=True)
        return without_rounding(jnp.broadcast_to(mean, segment.pos.shape))

    return scorer._replace(score=score, aligned=True)


def in_blocks(scorer: Scorer, size: int, top: int | None = None) -> Scorer:
    """Gives all tokens of a block the mean score of the block.

    Block b holds positions `b * size` to `(b + 1) * size - 1`; of one that a budget cuts, the oldest tokens stay.

    Args:
      scorer: what a token is worth; finite.
      size: tokens of a block, at least 1.
      top: the mean of so many highest scores; None: of all.

    Source: Liu et al., ChunkKV (2025), arXiv:2502.00299, algorithm 1; `top` is of WindowKV (2025), arXiv:2503.17922.
    """
    if size < 1 or not (top is None or 1 <= top <= size):
        raise ValueError(f"size must be at least 1 token and top at most size or None, got {size} and {top}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        pos, scores = segment.pos, scorer.score(segment, seen)
        S = pos.shape[2]
        # Blocks are runs of the slots in token order: numbered as they come, so that positions may lie far apart.
        key = jnp.where(pos < 0, jnp.iinfo(jnp.int32).max, pos // size)
        by = -scores if top else pos.astype(jnp.float32)
        index = jnp.broadcast_to(jnp.arange(S), pos.shape)
        key, _, _, order = jax.lax.sort((key, by, pos, index), num_keys=3)
        first = jnp.pad(key[..., 1:] != key[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
        block = jnp.cumsum(first, axis=-1) - 1
        start = jax.lax.cummax(jnp.where(first, jnp.arange(S), 0), axis=2)
        counted = jnp.arange(S) - start < (top or S)
        total = jax.vmap(jax.vmap(lambda x, of: jax.ops.segment_sum(x, of, S, indices_are_sorted=True)[of]))
        ordered = jnp.take_along_axis(scores, order, axis=-1)
        mean = total(jnp.where(counted, ordered, 0.0), block) / total(counted.astype(jnp.float32), block)
        return without_rounding(jnp.take_along_axis(mean, jnp.argsort(order, axis=-1), axis=-1))

    return scorer._replace(score=score)


def output_perturbation(scorer: Scorer, first: float = 0.5, epsilon: float = 1e-4) -> Scorer:
    """Weighs what a scorer says with how much of a slot's value reaches the layer's output.

    The `first` of the slots that may stay beside the protected are those the scorer says; the others are those of
    highest `(s + epsilon) * mean_g ||W_g v||_1`, W_g the output projection of query head g of the group.

    Args:
      scorer: what a slot is worth, at least 0: the attention it receives.
      first: share of the budget that the scorer decides alone.
      epsilon: lets slots without attention count by their value.

    The layer's projections are `LayerObservation.learned["output"]`, f32[N, H, D]; see `kvjax.transforms.learned`.

    Source: Feng et al., CriticalKV (2025), arXiv:2502.03805, algorithm 1; kvpress, `CriticalKVPress`.
    """
    if not 0 <= first <= 1 or epsilon < 0:
        raise ValueError(f"first must be in [0, 1] and epsilon at least 0, got {first} and {epsilon}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        quota, scores = quota_of(seen, "output_perturbation"), scorer.score(segment, seen)
        projected = _projected_norm(segment.values_apart("output_perturbation"), seen.learned["output"])
        order = places(highest_first(priority(jnp.where(quota.protected, -jnp.inf, scores), segment.pos), segment.pos))
        chosen = order < quota.free(first)[..., None]
        return jnp.where(chosen, jnp.inf, without_rounding((scores + epsilon) * projected))

    return scorer._replace(score=score)


def crushed(scorer: Scorer, share: float = 0.25, anchor: Anchor = "alternate") -> Scorer:
    """Spends a share of the budget on tokens that stand for the others, the rest on the highest scores.

    Every head keeps the same tokens. `1 - share` of the slots that may stay beside the protected are those of highest
    mean score over the KV heads. Each token left has a signature of K bits, bit h set where it is in the upper half of
    them for head h. They are sorted by the Hamming distance of their signature to the anchor, the oldest of a tie
    first, and as many of them, evenly spaced, stay as there is room for.

    Args:
      scorer: what a slot is worth.
      share: of the budget, for representatives.
      anchor: "alternate" (bits 0101...), "zeros", "ones", or "mean" (a bit is set where it is for most tokens).

    Source: Jha et al., KVCrush (2025), arXiv:2503.00022; openvino.genai, `kvcrush.cpp`.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}.")
    if anchor not in get_args(Anchor):
        raise ValueError(f"anchor must be one of {', '.join(get_args(Anchor))}, got {anchor!r}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        quota, by_head, pos = quota_of(seen, "crushed"), scorer.score(segment, seen), segment.pos
        left = jnp.where(quota.protected, -1, pos)
        place = lambda x, among: places(highest_first(priority(x, among), among))
        mean = without_rounding(jnp.broadcast_to(jnp.mean(by_head, axis=1, keepdims=True), pos.shape))
        order = place(mean, left)
        room, kept = quota.free()[..., None], quota.free(1 - share)[..., None]
        important = (order < kept) & (left >= 0)
        left = jnp.where(important, -1, left)
        count = jnp.sum(left >= 0, axis=-1, keepdims=True)
        bits = place(by_head, left) < (count + 1) // 2
        K = pos.shape[1]
        if anchor == "mean":
            of_head = 2 * jnp.sum(bits & (left >= 0), axis=-1, keepdims=True) > count
        else:
            of_head = jnp.arange(K)[:, None] % 2 == 1 if anchor == "alternate" else jnp.full((K, 1), anchor == "ones")
        distance = jnp.broadcast_to(jnp.sum(bits ^ of_head, axis=1, keepdims=True), pos.shape)
        nearest = place(-distance.astype(jnp.float32), left)
        rate = (room - kept) / jnp.maximum(count, 1)
        upto = lambda index: jnp.floor(index * rate + 1e-3)
        stands = (left >= 0) & (upto(nearest + 1) > upto(nearest))
        return jnp.where(important, jnp.inf, jnp.where(stands, 0.0, -1.0 - order))

    return scorer._replace(score=score, aligned=True)


def _projected_norm(values: jax.Array, output: jax.Array) -> jax.Array:
    """f32[B, K, S]: the mean over a query group of `||W_g v||_1`, of values [B, K, S, H] and W [N, H, D]."""
    B, K, S, H = values.shape
    count = -(-S // _BLOCK)
    blocks = jnp.pad(values, ((0, 0), (0, 0), (0, count * _BLOCK - S), (0, 0))).reshape(B, K, count, _BLOCK, H)
    output = output.reshape(K, -1, *output.shape[1:])
    norm = lambda v: jnp.mean(jnp.sum(jnp.abs(jnp.einsum("bksh,kghd->bkgsd", v, output)), axis=-1), axis=2)
    each = jax.lax.map(norm, jnp.moveaxis(blocks, 2, 0).astype(jnp.float32))  # [blocks, B, K, _BLOCK]
    return jnp.moveaxis(each, 0, 2).reshape(B, K, -1)[..., :S]


def _joined(scorers: Sequence[Scorer], score: Callable[[Segment, LayerObservation], jax.Array]) -> Scorer:
    """Returns a scorer with what several need and keep.

    Raises:
      ValueError: two keep the same statistic, or one wants the last queries and another all of them: of a prompt that
        comes in chunks, its end then shows nothing.
    """
    stats = [name for scorer in scorers for name in scorer.stats]
    if len(set(stats)) < len(stats):
        raise ValueError(f"scorers must keep statistics of different names to be joined, got {', '.join(stats)}.")
    asked = {scorer.needs.queries for scorer in scorers} - {0}
    if ALL in asked and len(asked) > 1:
        raise ValueError(
            f"scorers must all add up attention, or all look at the last queries, got {sorted(asked - {ALL})} queries "
            "beside all of them: end_attention adds up what the last queries of a prompt give."
        )
    needs = Needs()
    for scorer in scorers:
        needs = needs.union(scorer.needs)

    def observe(segment: Segment, seen: LayerObservation) -> Segment:
        for scorer in scorers:
            segment = scorer.observe(segment, seen)
        return segment

    aligned = all(scorer.aligned for scorer in scorers)
    rotated = any(scorer.rotated for scorer in scorers)
    return Scorer(score, needs, tuple(stats), observe, aligned, rotated)


def _standardised(scores: jax.Array, occupied: jax.Array, standard: Standard) -> jax.Array:
    """f32[B, K, S], made comparable over the occupied slots of a row that have a finite score."""
    if standard == "none":
        return scores
    counted = occupied & jnp.isfinite(scores)
    axes = dict(axis=(1, 2), keepdims=True)
    if standard == "range":
        low = jnp.min(jnp.where(counted, scores, jnp.inf), **axes)
        spread = jnp.max(jnp.where(counted, scores, -jnp.inf), **axes) - low
    else:
        count = jnp.sum(counted, **axes)
        low = jnp.sum(jnp.where(counted, scores, 0.0), **axes) / jnp.maximum(count, 1)
        squares = jnp.sum(jnp.where(counted, (scores - low) ** 2, 0.0), **axes)
        spread = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return jnp.where(counted, jnp.where(spread > 0, (scores - low) / jnp.where(spread > 0, spread, 1.0), 0.0), scores)
