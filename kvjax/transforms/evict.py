"""Scores slots and keeps a budget of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.budget import budget_rows, budget_slots, check_budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Needs, Observation
from kvjax.segments.dense import DenseSegment, dense_tail
from kvjax.segments.slots import keep_highest
from kvjax.transforms.base import CacheTransform, keep

_PROTECTED = 1e30  # above any score, even after division by the length of a context


class Scorer(NamedTuple):
    """Says how much each slot is worth keeping.

    Attributes:
      score: `(segment, layer observation) -> f32[B, K, S]`; the highest are kept, empty slots are ignored.
      needs: what the decoder must collect for it.
      stats: names of the per-slot statistics it keeps in the segment, beside keys and values.
      observe: `(segment, layer observation) -> segment` brings the statistics up to date.
    """

    score: Callable[[DenseSegment, LayerObservation], jax.Array]
    needs: Needs = Needs()
    stats: tuple[str, ...] = ()
    observe: Callable[[DenseSegment, LayerObservation], DenseSegment] = lambda segment, seen: segment


def evict(
    scorer: Scorer,
    budget: int | float,
    *,
    sinks: int = 0,
    recent: int | float = 0,
) -> CacheTransform:
    """Keeps, per KV head, the `budget` slots with the highest scores, and frees the memory of the rest.

    `init` gathers the survivors into a segment of `budget` slots. `update` empties the lowest-scored slots
    above the budget; new tokens take their place. Ties go to the lower slot.

    Args:
      scorer: what a slot is worth.
      budget: tokens per KV head, as a count or as a fraction of each row's prompt.
      sinks: first tokens of the sequence that are always kept.
      recent: newest tokens that are always kept: a count, or a fraction of the budget.

    Raises:
      ValueError: the budget cannot hold the sinks and the recent tokens.
    """
    if sinks < 0 or recent < 0:
        raise ValueError(f"sinks and recent must be at least 0, got {sinks} and {recent}.")
    if isinstance(recent, float) and recent > 1:
        raise ValueError(f"recent as a fraction of the budget must be at most 1, got {recent}.")
    recent_count = recent if isinstance(recent, int) else 0
    check_budget(
        budget,
        at_least=max(1, sinks + recent_count),
        holds=f"{sinks} sinks and {recent_count} recent tokens",
    )

    def worth(segment: DenseSegment, seen: LayerObservation, rows: jax.Array) -> jax.Array:
        scores = scorer.score(segment, seen).astype(jnp.float32)
        newest = jnp.max(segment.pos, axis=-1, keepdims=True)
        if isinstance(recent, float):
            count = jnp.floor(recent * rows + 1e-3).astype(jnp.int32)[:, None, None]
        else:
            count = recent
        protected = (segment.pos > newest - count) | (segment.pos < sinks)
        age = (newest - segment.pos).astype(jnp.float32)
        # Where a row's budget is smaller than what is protected, the newest stay.
        return jnp.where(protected, _PROTECTED / (1.0 + age), scores)

    @functools.partial(jax.jit, static_argnames="slots")
    def compress(layer: LayerCache, seen: LayerObservation, rows: jax.Array, *, slots: int):
        segment = dense_tail(layer, "evict")
        if segment.pos.shape[2] < slots:
            segment = segment.resize(slots)
        missing = {name: jnp.zeros(segment.pos.shape, jnp.float32) for name in scorer.stats}
        segment = scorer.observe(segment.replace(stats={**missing, **segment.stats}), seen)
        scores = worth(segment, seen, rows)
        return layer.with_tail(segment.take(*keep_highest(scores, segment.pos >= 0, slots, rows)))

    @jax.jit
    def see(layer: LayerCache, seen: LayerObservation):
        return layer.with_tail(scorer.observe(dense_tail(layer, "evict"), seen))

    @jax.jit
    def drop_excess(layer: LayerCache, seen: LayerObservation, rows: jax.Array):
        segment = dense_tail(layer, "evict")
        occupied = segment.pos >= 0
        excess = jnp.sum(occupied, axis=-1) - rows[:, None]  # [B, K]
        scores = jnp.where(occupied, worth(segment, seen, rows), jnp.inf)
        return layer.with_tail(segment.drop(lowest(scores, excess)))

    def init(cache: Cache, observation: Observation):
        slots = budget_slots(budget, observation.prompt_slots)
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots)
        if slots < sinks + recent_count:
            raise ValueError(
                f"budget must hold {sinks} sinks and {recent_count} recent tokens, got {budget} of "
                f"{observation.prompt_slots} tokens = {slots}."
            )
        shrink = lambda layer, seen: compress(layer, seen, rows, slots=slots)
        return cache.map_layers(shrink, observation.layers), rows

    def observe(cache: Cache, rows: jax.Array, observation: Observation):
        return cache.map_layers(see, observation.layers), rows

    def update(cache: Cache, rows: jax.Array, observation: Observation):
        free = lambda layer, seen: drop_excess(layer, seen, rows)
        return cache.map_layers(free, observation.layers), rows

    return CacheTransform(
        init=init,
        update=update,
        observe=observe if scorer.stats else keep,
        needs=scorer.needs,
        frees_in_prefill=1,
        frees_in_decode=1,
        budget=budget,
    )


def lowest(scores: jax.Array, count: jax.Array) -> jax.Array:
    """bool[B, K, S]: the `count` (i32[B, K]) lowest scores of each head; ties take the lower slot."""
    S = scores.shape[-1]

    def one():
        return (jnp.argmin(scores, axis=-1)[..., None] == jnp.arange(S)) & (count > 0)[..., None]

    def several():
        rank = jnp.argsort(jnp.argsort(scores, axis=-1, stable=True), axis=-1)  # 0 = lowest
        return rank < count[..., None]

    # Decoding adds one token a call: a minimum is enough, and two sorts a layer are not paid for.
    return jax.lax.cond(jnp.max(count) <= 1, one, several)
