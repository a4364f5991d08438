"""Scores slots and keeps a budget of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from kvjax.budget import Budget, check_budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import ALL, LayerObservation, Needs, Observation, Quota
from kvjax.segments.moves import keep_best
from kvjax.segments.segment import Segment, slot_tail
from kvjax.segments.slots import LAST, lowest, priority, token_order
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.layer_budgets import LayerBudgets, excess_over, split_budget
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Observer, Schedule


class Scorer(NamedTuple):
    """Says how much each slot is worth keeping.

    Attributes:
      score: `(segment, layer observation) -> f32[B, K, S]`; the highest are kept, of equal ones the oldest. Empty
        slots are ignored, NaN is the lowest, and no score is above that of a protected slot.
      needs: what the decoder must collect for it.
      stats: names of the per-slot statistics it keeps in the segment, beside keys and values.
      observe: `(segment, layer observation) -> segment` brings the statistics up to date.
      aligned: the scores of a token are the same in every head of a layer.
      rotated: it reads keys as attention does at their tokens' positions, so they must be stored rotated.
    """

    score: Callable[[Segment, LayerObservation], jax.Array]
    needs: Needs = Needs()
    stats: tuple[str, ...] = ()
    observe: Callable[[Segment, LayerObservation], Segment] = lambda segment, seen: segment
    aligned: bool = False
    rotated: bool = False


class Told(NamedTuple):
    """The scores of one layer's slots, for the tokens of another."""

    scores: Float32[Array, "B K S"]
    pos: Int32[Array, "B K S"]

    def of(self, pos: jax.Array) -> jax.Array:
        """Returns f32[B, K, n], the scores of the tokens at i32[B, K, n]; -inf for those that the layer lacks."""
        order = token_order(self.pos)
        known = jnp.take_along_axis(jnp.where(self.pos < 0, LAST, self.pos), order, axis=-1)
        find = jax.vmap(jax.vmap(jnp.searchsorted))
        place = jnp.minimum(find(known, pos), known.shape[2] - 1)
        there = jnp.take_along_axis(known, place, axis=-1) == pos
        scores = jnp.take_along_axis(jnp.take_along_axis(self.scores, order, axis=-1), place, axis=-1)
        return jnp.where(there, scores, -jnp.inf)


def evict(
    scorer: Scorer,
    budget: Budget,
    *,
    sinks: int = 0,
    recent: Budget = 0,
    layers: LayerBudgets | None = None,
    reuse: int = 1,
) -> CacheTransform:
    """Keeps, per KV head, the `budget` slots with the highest scores, and frees the memory of the rest.

    `init` gathers the survivors into a segment of `budget` slots. `update` empties the lowest-scored slots
    above the budget; new tokens take their place. Of equal scores the oldest stay.

    Args:
      scorer: what a slot is worth.
      budget: tokens per KV head, as a count or as a fraction of each row's prompt; a fraction is never less than the
        sinks and the recent tokens.
      sinks: first tokens of the sequence that are always kept.
      recent: newest tokens that are always kept: a count, or a fraction of the budget, as far as sinks leave room.
      layers: splits the budget of each row unevenly over the layers.
      reuse: layers in a row that keep what the first of them scores, by token and head; 1: each scores for itself.

    Raises:
      TypeError: scorer is not a `Scorer`.
      ValueError: the budget cannot hold the sinks and the recent tokens, or fewer than one layer in a row, or several
        with a scorer that keeps statistics.
    """
    check_scorer(scorer, "evict")
    always = check_protected(budget, sinks, recent)
    if reuse < 1:
        raise ValueError(f"reuse must be at least 1 layer, got {reuse}.")
    if reuse > 1 and scorer.stats:
        raise ValueError(f"reuse must be 1 for a scorer that keeps statistics of each layer, got {reuse}.")

    def worth(segment: Segment, seen: LayerObservation, rows: jax.Array, told: Told | None) -> tuple:
        protected = is_protected(segment.pos, rows, sinks, recent)
        if told is not None:
            return priority(told.of(segment.pos), segment.pos, protected), told
        scores = slot_scores(scorer, segment, seen.replace(quota=Quota(rows, protected)))
        return priority(scores, segment.pos, protected), Told(scores, segment.pos)

    @functools.partial(jax.jit, static_argnames="slots")
    def compress(layer: LayerCache, seen: LayerObservation, rows: jax.Array, told: Told | None, *, slots: int):
        segment = slot_tail(layer, "evict")
        if segment.pos.shape[2] < slots:
            segment = segment.resize(slots)
        segment = observed(scorer, segment, seen)
        order, told = worth(segment, seen, rows, told)
        return layer.with_tail(keep_best(segment, order, slots, rows)), told if reuse > 1 else None

    @jax.jit
    def drop_excess(layer: LayerCache, seen: LayerObservation, rows: jax.Array, told: Told | None):
        segment = slot_tail(layer, "evict")
        excess = jnp.sum(segment.pos >= 0, axis=-1) - rows[:, None]  # [B, K]
        order, told = worth(segment, seen, rows, told)
        return layer.with_tail(segment.drop(lowest(order, segment.pos, excess))), told if reuse > 1 else None

    def each_layer(run: Callable, cache: Cache, observation: Observation, *rest: Sequence) -> Cache:
        """`run(layer, seen, *entries of rest, told) -> (layer, told)`: the first of `reuse` layers tells the others."""
        shrunk, told = [], None
        for index, entries in enumerate(zip(cache.layers, observation.each_layer(), *rest, strict=True)):
            layer, told = run(*entries, None if index % reuse == 0 else told)
            shrunk.append(layer)
        return cache.replace(layers=tuple(shrunk))

    def init(cache: Cache, observation: Observation):
        each = split_budget(budget, len(cache.layers), observation, layers, always)
        run = lambda layer, seen, to, told: compress(layer, seen, to[1], told, slots=to[0])
        return each_layer(run, cache, observation, each), tuple(rows for _, rows in each)

    def update(cache: Cache, rows: tuple[jax.Array, ...], observation: Observation):
        return each_layer(drop_excess, cache, observation, rows), rows

    return CacheTransform(
        init=init,
        update=update,
        schedule=Schedule(
            needs=scorer.needs,
            observer=observer_of(scorer, "evict"),
            frees_in_prefill=1,
            frees_in_decode=1,
            budget=budget,
            excess=excess_over(budget, layers, always),
            at_least=always,
            name="evict",
            order=Order.of(asks(scorer, "slots room"), "whole" if scorer.aligned else "whole aligned"),
        ),
    )


def check_scorer(scorer: Scorer, transform: str) -> None:
    """Checks, when a method is built, that its scorer is one.

    Raises:
      TypeError: names the transform, what came and what was expected.
    """
    if not isinstance(scorer, Scorer):
        raise TypeError(
            f"{transform} needs a Scorer, such as kvjax.scores.negative_key_norm() or "
            f"kvjax.Scorer(score=lambda segment, seen: ...), got {scorer!r}."
        )


def asks(scorer: Scorer, names: str) -> str:
    """Returns `names` of what a transform needs of slots (`Order.of`), and with them what its scorer needs."""
    return names + " rotated" * scorer.rotated


def check_protected(budget: Budget, sinks: int, recent: Budget) -> int:
    """Checks, when a method is built, that a budget holds what is always kept; returns how many tokens that are.

    A `recent` that is a fraction is a part of the budget: what the sinks leave of it, but at least one token.

    Raises:
      ValueError: the budget cannot hold the sinks and the recent tokens, or these make no sense.
    """
    if sinks < 0 or recent < 0:
        raise ValueError(f"sinks and recent must be at least 0, got {sinks} and {recent}.")
    if isinstance(recent, float) and recent > 1:
        raise ValueError(f"recent as a fraction of the budget must be at most 1, got {recent}.")
    count = recent if isinstance(recent, int) else int(recent > 0)
    check_budget(budget, at_least=max(1, sinks + count), holds=f"{sinks} sinks and {count} recent tokens")
    return sinks + count


def is_protected(
    pos: Int32[Array, "B K S"], rows: Int32[Array, " B"], sinks: int, recent: Budget
) -> Bool[Array, "B K S"]:
    """bool[B, K, S]: the slots that are always kept.

    Args:
      pos: i32[B, K, S].
      rows: i32[B], budget of each row, of which a fractional `recent` is a part: what the sinks leave of it, but at
        least one token.
      sinks: first tokens of the sequence.
      recent: newest tokens.
    """
    newest = jnp.max(pos, axis=-1, keepdims=True)
    if isinstance(recent, float):
        share = jnp.floor(recent * rows + 1e-3).astype(jnp.int32)
        recent = jnp.clip(share, int(recent > 0), jnp.maximum(rows - sinks, 0))[:, None, None]
    return (pos >= 0) & ((pos > newest - recent) | (pos < sinks))


def observer_of(scorer: Scorer, transform: str) -> Observer:
    """Returns what keeps a scorer's statistics in the last segment of every layer.

    Before `init` only those that add up over all queries are kept: what a prompt's last queries say is seen at its end.

    Args:
      scorer: whose statistics they are.
      transform: what errors call it.
    """
    if not scorer.stats:
        return Observer()

    @jax.jit
    def see(layer: LayerCache, seen: LayerObservation) -> LayerCache:
        return layer.with_tail(observed(scorer, slot_tail(layer, transform), seen))

    def after_call(cache: Cache, state, observation: Observation):
        return cache.map_layers(see, observation.each_layer()), state

    def after_chunk(cache: Cache, observation: Observation) -> Cache:
        return cache.map_layers(see, observation.each_layer())

    return Observer(after_call, after_chunk if scorer.needs.queries == ALL else None)


def observed(scorer: Scorer, segment: Segment, seen: LayerObservation) -> Segment:
    """Returns the segment with the scorer's statistics brought up to date; what it stores stays as it is."""
    segment = with_stats(segment, scorer)
    return segment.replace(slots=scorer.observe(segment.dense(), seen).slots)


def with_stats(segment: Segment, scorer: Scorer) -> Segment:
    """The segment with the scorer's statistics, zero where it had none."""
    missing = {name: jnp.zeros(segment.pos.shape, jnp.float32) for name in scorer.stats}
    return segment.with_slots(stats={**missing, **segment.stats})


def slot_scores(scorer: Scorer, segment: Segment, seen: LayerObservation) -> jax.Array:
    """Returns what a scorer says of each slot, f32[B, K, S], without NaN: that is -inf.

    Raises:
      ValueError: the scores are not one number for each slot; names the scorer.
    """
    scores = scorer.score(segment.dense(), seen)
    name = getattr(scorer.score, "__qualname__", repr(scorer.score)).removesuffix(".<locals>.score")
    came = f"{getattr(scores, 'dtype', type(scores).__name__)}{list(getattr(scores, 'shape', ()))}"
    if getattr(scores, "shape", None) != segment.pos.shape or jnp.issubdtype(scores.dtype, jnp.complexfloating):
        raise ValueError(
            f"scorer {name} must return a real number for each slot, [B, K, S] = {list(segment.pos.shape)}, got {came}."
        )
    scores = scores.astype(jnp.float32)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def worth_keeping(
    scorer: Scorer, segment: Segment, seen: LayerObservation, protected: jax.Array
) -> Int32[Array, "B K S"]:
    """i32[B, K, S]: the order of the scores, with the protected slots (bool[B, K, S]) above all others."""
    return priority(slot_scores(scorer, segment, seen), segment.pos, protected)
