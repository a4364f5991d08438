"""What a slot is worth: the scores that eviction methods share.

Every function returns a `Scorer`; scores are f32[B, K, S], the highest are kept.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.observation import ALL, LayerObservation, Needs
from kvjax.segments.dense import DenseSegment
from kvjax.segments.slots import token_order
from kvjax.transforms.evict import Scorer

Pooling = Literal["avg", "max"]


def random(seed: int) -> Scorer:
    """A pseudo-random number per (seed, layer, head, token): the same for a token at every call."""

    def score(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
        K = segment.pos.shape[1]
        key = jax.random.fold_in(jax.random.key(seed), seen.layer)
        heads = jax.vmap(lambda h: jax.random.fold_in(key, h))(jnp.arange(K))
        draw = lambda head, pos: jax.random.uniform(jax.random.fold_in(head, pos))
        per_head = jax.vmap(jax.vmap(draw, in_axes=(None, 0)))  # [K], [K, S]
        return jax.vmap(per_head, in_axes=(None, 0))(heads, segment.pos)

    return Scorer(score=score)


def negative_key_norm() -> Scorer:
    """`-||k||_2`: keys of small norm attract attention."""

    def score(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
        return -jnp.linalg.norm(segment.k.astype(jnp.float32), axis=-1)

    return Scorer(score=score)


def key_difference() -> Scorer:
    """`-cos(k, mean of the unit keys)`, over the occupied slots of a head: distinct keys are worth more."""

    def score(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
        unit = _unit(segment.k.astype(jnp.float32))
        occupied = (segment.pos >= 0)[..., None]
        count = jnp.maximum(jnp.sum(occupied, axis=2, keepdims=True), 1)
        anchor = jnp.sum(jnp.where(occupied, unit, 0.0), axis=2, keepdims=True) / count
        return -jnp.sum(unit * _unit(anchor), axis=-1)

    return Scorer(score=score)


def window_attention(window: int, kernel: int = 5, pooling: Pooling = "avg") -> Scorer:
    """Mean attention from the last `window` queries, group-averaged, then pooled over neighbouring tokens.

    `s[k, j] = pool_kernel(mean_{g, q in window} p[k, g, q, j])`. Pooling runs over the slots older than the
    window in token order; the window itself should be protected by `recent=window`.

    Args:
      window: [W] queries.
      kernel: pooled tokens, odd; zeros beyond the ends count, as in torch's pooling.
      pooling: "avg" or "max".
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 query, got {window}.")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 1, got {kernel}.")
    if pooling not in ("avg", "max"):
        raise ValueError(f"pooling must be 'avg' or 'max', got {pooling!r}.")

    def score(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
        mass = _group_mean(_mass(segment, seen), segment) / window
        newest = jnp.max(segment.pos, axis=-1, keepdims=True)
        mass = jnp.where(segment.pos <= newest - window, mass, 0.0)
        return _pool_in_token_order(mass, segment.pos, kernel, pooling)

    return Scorer(score=score, needs=Needs(queries=window))


def accumulated_attention(normalise: bool = False) -> Scorer:
    """All the attention a token has received since it was written, averaged over the query group.

    Args:
      normalise: divide by the number of queries that could see the token, which removes the advantage of
        early tokens and changes the ranking.
    """
    mass_of, seen_by = "attention", "queries"

    def observe(segment: DenseSegment, seen: LayerObservation) -> DenseSegment:
        mass = _group_mean(_mass(segment, seen), segment)
        stats = {**segment.stats, mass_of: segment.stats[mass_of] + mass}
        if normalise:
            q_pos = seen.queries.pos[:, None, None, :]
            could_see = (q_pos >= segment.pos[..., None]) & (segment.pos >= 0)[..., None]
            stats[seen_by] = stats[seen_by] + jnp.sum(could_see, axis=-1)
        return segment.replace(stats=stats)

    def score(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
        if normalise:
            return segment.stats[mass_of] / jnp.maximum(segment.stats[seen_by], 1.0)
        return segment.stats[mass_of]

    return Scorer(
        score=score,
        needs=Needs(queries=ALL),
        stats=(mass_of, seen_by) if normalise else (mass_of,),
        observe=observe,
    )


def last_query_attention() -> Scorer:
    """Attention from the newest query alone, averaged over all heads: every head keeps the same tokens."""

    def score(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
        mean = jnp.mean(_mass(segment, seen), axis=1, keepdims=True)  # over N
        return jnp.broadcast_to(mean, segment.pos.shape)

    return Scorer(score=score, needs=Needs(queries=1))


def _mass(segment: DenseSegment, seen: LayerObservation) -> jax.Array:
    return segment.mass(seen.queries, seen.lse, window=seen.window, scale=seen.scale)


def _group_mean(per_query_head: jax.Array, segment: DenseSegment) -> jax.Array:
    """f32[B, N, S] -> f32[B, K, S]."""
    B, N, S = per_query_head.shape
    K = segment.pos.shape[1]
    return jnp.mean(per_query_head.reshape(B, K, N // K, S), axis=2)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _pool_in_token_order(x: jax.Array, pos: jax.Array, kernel: int, pooling: Pooling) -> jax.Array:
    """Pools over neighbours in token order, wherever their slots lie."""
    order = token_order(pos)
    ordered = jnp.take_along_axis(x, order, axis=-1)
    half = kernel // 2
    padded = jnp.pad(ordered, [(0, 0), (0, 0), (half, half)])
    shifts = [padded[..., i : i + x.shape[-1]] for i in range(kernel)]
    if pooling == "avg":
        pooled = sum(shifts) / kernel
    else:
        pooled = jnp.stack(shifts).max(axis=0)
    return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)
