"""Scores slots and keeps a budget of them that the heads of a layer share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.budget import budget_rows, budget_slots
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments import DenseSegment, RaggedSegment
from kvjax.segments.dense import dense_tail
from kvjax.segments.slots import ranks
from kvjax.transforms.base import PLAIN, CacheTransform
from kvjax.transforms.evict import Scorer, check_protected, check_protected_fit, is_protected, protect

HeadBudgets = Callable[[jax.Array, jax.Array], jax.Array]
"""`(f32[B, K, S] scores, i32[B] tokens per head) -> i32[B, K]`: how many of its slots each head keeps.

Slots that are empty or kept in any case score `-inf`. A row's sum should be K times its tokens per head; each
head's share may be rounded.
"""


def adaptive(floor: float = 0.2, normalise: bool = False) -> HeadBudgets:
    """Gives a head the slots it has among the K * n highest scores of its layer, and at least a floor.

    `n_h = round((1 - floor) * a_h + floor * n)`, where `a_h` counts the head's slots among the highest.

    Args:
      floor: fraction of the uniform share that every head gets.
      normalise: multiply a head's scores by the fraction of their sum that its n highest hold, before heads
        are compared.

    Source: Feng et al., Ada-KV (2024), algorithm 1 and its official code.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor}.")

    def allocate(scores: jax.Array, per_head: jax.Array) -> jax.Array:
        B, K, S = scores.shape
        if normalise:
            mass = jnp.where(scores == -jnp.inf, 0.0, scores)
            top = jnp.sum(jnp.where(ranks(-scores) < per_head[:, None, None], mass, 0.0), axis=-1)
            scores = scores * (top / jnp.maximum(jnp.sum(mass, axis=-1), 1e-12))[..., None]
        chosen = (ranks(-scores.reshape(B, -1)) < K * per_head[:, None]).reshape(B, K, S)
        counts = jnp.sum(chosen & (scores > -jnp.inf), axis=-1)
        uniform = per_head[:, None].astype(jnp.float32)
        return jnp.round((1 - floor) * counts + floor * uniform).astype(jnp.int32)

    return allocate


def evict_by_head(
    scorer: Scorer,
    budget: int | float,
    *,
    heads: HeadBudgets,
    sinks: int = 0,
    recent: int | float = 0,
    page: int = 16,
) -> CacheTransform:
    """Keeps `budget` slots per KV head on average over a layer, each head its own number, in pages.

    Acts when the prompt is in. The total of a layer is fixed, so bytes follow the budget: K * budget slots,
    and at most K - 1 pages and K / 2 slots that rounding may need. Tokens that follow go to a dense segment.

    Args:
      scorer: what a slot is worth.
      budget: tokens per KV head on average, as a count or as a fraction of each row's prompt.
      heads: how many slots each head keeps, beside the sinks and the recent tokens.
      sinks: first tokens of the sequence that every head keeps.
      recent: newest tokens that every head keeps: a count, or a fraction of the budget.
      page: slots of a page.

    Raises:
      ValueError: the budget cannot hold the sinks and the recent tokens.
    """
    recent_count = check_protected(budget, sinks, recent)
    if page < 1:
        raise ValueError(f"page must be at least 1 slot, got {page}.")

    @functools.partial(jax.jit, static_argnames="slots")
    def compress(layer: LayerCache, seen: LayerObservation, rows: jax.Array, *, slots: int):
        segment = dense_tail(layer, "evict_by_head")
        scores = slot_scores(scorer, segment, seen)
        keep = choose(scores, segment.pos, rows, heads, sinks, recent)
        return layer.replace(segments=(*layer.segments[:-1], in_pages(segment, keep, slots, page), segment.no_slots()))

    def init(cache: Cache, observation: Observation):
        slots = budget_slots(budget, observation.prompt_slots)
        check_protected_fit(budget, observation.prompt_slots, sinks, recent_count)
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots)
        shrink = lambda layer, seen: compress(layer, seen, rows, slots=slots)
        return cache.map_layers(shrink, observation.layers), ()

    return CacheTransform(
        init=init, needs=scorer.needs, budget=budget, name="evict_by_head", takes=PLAIN, leaves="paged"
    )


def slot_scores(scorer: Scorer, segment: DenseSegment, seen: LayerObservation) -> jax.Array:
    """f32[B, K, S]: what a scorer that has seen nothing before makes of a whole prompt; `-inf` for empty slots."""
    stats = {name: jnp.zeros(segment.pos.shape, jnp.float32) for name in scorer.stats}
    segment = scorer.observe(segment.replace(stats=stats), seen)
    return jnp.where(segment.pos >= 0, scorer.score(segment, seen).astype(jnp.float32), -jnp.inf)


def choose(
    scores: jax.Array, pos: jax.Array, rows: jax.Array, heads: HeadBudgets, sinks: int, recent: int | float
) -> jax.Array:
    """bool[B, K, S]: the slots that stay, when K heads share K times the budgets i32[B] `rows`."""
    protected = is_protected(pos, rows, sinks, recent)
    worth = protect(scores, pos, protected)
    always = jnp.minimum(jnp.sum(protected, axis=-1), rows[:, None])  # [B, K]
    free = jnp.where(protected, -jnp.inf, scores)
    count = always + heads(free, rows - always[:, 0])
    return (pos >= 0) & (ranks(-worth) < count[..., None])


def in_pages(segment: DenseSegment, keep: jax.Array, slots: int, page: int) -> RaggedSegment:
    """The slots where bool[B, K, S] is true, in pages for K * slots of them and what rounding may add."""
    B, K, S = segment.pos.shape
    flat = lambda x: x.reshape(B, 1, K * S, *x.shape[3:])
    return RaggedSegment.of_flat(
        jax.tree.map(flat, segment.replace(stats={})),
        jnp.broadcast_to(jnp.arange(K)[:, None], (B, K, S)).reshape(B, -1),
        keep.reshape(B, -1),
        kv_heads=K,
        page=page,
        pages=min(-(-(K * slots + K // 2) // page) + K - 1, K * -(-S // page)),
    )
