"""Scores slots and keeps a budget of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.budget import budget_slots, check_budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Needs, Observation
from kvjax.segments.dense import DenseSegment, dense_tail
from kvjax.segments.slots import keep_best, ranks
from kvjax.transforms.base import PLAIN, CacheTransform, keep
from kvjax.transforms.layer_budgets import LayerBudgets, split_budget

_PROTECTED = 1e30  # above any score, even after division by the length of a context


class Scorer(NamedTuple):
    """Says how much each slot is worth keeping.

    Attributes:
      score: `(segment, layer observation) -> f32[B, K, S]`; the highest are kept, empty slots are ignored.
      needs: what the decoder must collect for it.
      stats: names of the per-slot statistics it keeps in the segment, beside keys and values.
      observe: `(segment, layer observation) -> segment` brings the statistics up to date.
      aligned: the scores of a token are the same in every head of a layer.
    """

    score: Callable[[DenseSegment, LayerObservation], jax.Array]
    needs: Needs = Needs()
    stats: tuple[str, ...] = ()
    observe: Callable[[DenseSegment, LayerObservation], DenseSegment] = lambda segment, seen: segment
    aligned: bool = False


def evict(
    scorer: Scorer,
    budget: int | float,
    *,
    sinks: int = 0,
    recent: int | float = 0,
    layers: LayerBudgets | None = None,
) -> CacheTransform:
    """Keeps, per KV head, the `budget` slots with the highest scores, and frees the memory of the rest.

    `init` gathers the survivors into a segment of `budget` slots. `update` empties the lowest-scored slots
    above the budget; new tokens take their place. Ties go to the lower slot.

    Args:
      scorer: what a slot is worth.
      budget: tokens per KV head, as a count or as a fraction of each row's prompt.
      sinks: first tokens of the sequence that are always kept.
      recent: newest tokens that are always kept: a count, or a fraction of the budget.
      layers: splits the budget unevenly over the layers, as it does for the longest prompt of the batch.

    Raises:
      ValueError: the budget cannot hold the sinks and the recent tokens.
    """
    recent_count = check_protected(budget, sinks, recent)

    def worth(segment: DenseSegment, seen: LayerObservation, rows: jax.Array) -> jax.Array:
        return worth_keeping(scorer, segment, seen, is_protected(segment.pos, rows, sinks, recent))

    @functools.partial(jax.jit, static_argnames="slots")
    def compress(layer: LayerCache, seen: LayerObservation, rows: jax.Array, *, slots: int):
        segment = dense_tail(layer, "evict")
        if segment.pos.shape[2] < slots:
            segment = segment.resize(slots)
        segment = scorer.observe(with_stats(segment, scorer), seen)
        scores = worth(segment, seen, rows)
        return layer.with_tail(keep_best(segment, scores, slots, rows))

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
        check_protected_fit(budget, observation.prompt_slots, sinks, recent_count)
        each = split_budget(budget, len(cache.layers), observation, layers, sinks + recent_count)
        shrunk = [
            compress(layer, seen, rows, slots=slots)
            for layer, seen, (slots, rows) in zip(cache.layers, observation.layers, each, strict=True)
        ]
        return cache.replace(layers=tuple(shrunk)), tuple(rows for _, rows in each)

    def observe(cache: Cache, rows: tuple[jax.Array, ...], observation: Observation):
        return cache.map_layers(see, observation.layers), rows

    def update(cache: Cache, rows: tuple[jax.Array, ...], observation: Observation):
        return cache.map_layers(drop_excess, observation.layers, rows), rows

    return CacheTransform(
        init=init,
        update=update,
        observe=observe if scorer.stats else keep,
        needs=scorer.needs,
        frees_in_prefill=1,
        frees_in_decode=1,
        budget=budget,
        name="evict",
        takes=PLAIN,
        leaves="plain" if scorer.aligned else "by_head",
    )


def check_protected(budget: int | float, sinks: int, recent: int | float) -> int:
    """Checks, when a method is built, that a budget holds what is always kept; returns `recent` as a count.

    Raises:
      ValueError: the budget cannot hold the sinks and the recent tokens, or these make no sense.
    """
    if sinks < 0 or recent < 0:
        raise ValueError(f"sinks and recent must be at least 0, got {sinks} and {recent}.")
    if isinstance(recent, float) and recent > 1:
        raise ValueError(f"recent as a fraction of the budget must be at most 1, got {recent}.")
    count = recent if isinstance(recent, int) else 0
    check_budget(budget, at_least=max(1, sinks + count), holds=f"{sinks} sinks and {count} recent tokens")
    return count


def check_protected_fit(budget: int | float, prompt_slots: int, sinks: int, recent: int) -> None:
    """The same for a budget that is a fraction, when the prompt is known."""
    slots = budget_slots(budget, prompt_slots)
    if slots < sinks + recent:
        raise ValueError(
            f"budget must hold {sinks} sinks and {recent} recent tokens, got {budget} of {prompt_slots} tokens "
            f"= {slots}."
        )


def is_protected(pos: jax.Array, rows: jax.Array, sinks: int, recent: int | float) -> jax.Array:
    """bool[B, K, S]: the slots that are always kept.

    Args:
      pos: i32[B, K, S].
      rows: i32[B], budget of each row, of which a fractional `recent` is a part.
      sinks: first tokens of the sequence.
      recent: newest tokens.
    """
    newest = jnp.max(pos, axis=-1, keepdims=True)
    if isinstance(recent, float):
        recent = jnp.floor(recent * rows + 1e-3).astype(jnp.int32)[:, None, None]
    return (pos >= 0) & ((pos > newest - recent) | (pos < sinks))


def protect(scores: jax.Array, pos: jax.Array, protected: jax.Array) -> jax.Array:
    """Lifts protected slots above all others; the newest first, where a budget cannot hold all of them."""
    age = (jnp.max(pos, axis=-1, keepdims=True) - pos).astype(jnp.float32)
    return jnp.where(protected, _PROTECTED / (1.0 + age), scores)


def with_stats(segment: DenseSegment, scorer: Scorer) -> DenseSegment:
    """The segment with the scorer's statistics, zero where it had none."""
    missing = {name: jnp.zeros(segment.pos.shape, jnp.float32) for name in scorer.stats}
    return segment.replace(stats={**missing, **segment.stats})


def worth_keeping(
    scorer: Scorer, segment: DenseSegment, seen: LayerObservation, protected: jax.Array
) -> jax.Array:
    """f32[B, K, S]: the scores, with the protected slots (bool[B, K, S]) above all others."""
    return protect(scorer.score(segment, seen).astype(jnp.float32), segment.pos, protected)


def lowest(scores: jax.Array, count: jax.Array) -> jax.Array:
    """bool[B, K, S]: the `count` (i32[B, K]) lowest scores of each head; ties take the lower slot."""
    S = scores.shape[-1]

    def one():
        return (jnp.argmin(scores, axis=-1)[..., None] == jnp.arange(S)) & (count > 0)[..., None]

    def several():
        return ranks(scores) < count[..., None]

    # Decoding adds one token a call: a minimum is enough, and two sorts a layer are not paid for.
    return jax.lax.cond(jnp.max(count) <= 1, one, several)
