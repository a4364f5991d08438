"""Moves the slots that are worth least into a segment of their own, so that the two may be stored differently."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax import sharding
from kvjax.budget import Budget, budget_rows, budget_slots
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments.segment import Segment, dense_tail
from kvjax.segments.slots import keep_highest, marked
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.evict import (
    Scorer,
    asks,
    check_protected,
    check_scorer,
    is_protected,
    with_stats,
    worth_keeping,
)
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Observer, Schedule


def split_slots(
    scorer: Scorer, budget: Budget, *, sinks: int = 0, recent: Budget = 0
) -> CacheTransform:
    """Leaves, per KV head, the `budget` slots with the highest scores in the last segment; moves the rest before it.

    Nothing is lost, and nothing is gained before the segments are stored differently: what follows may treat them
    apart, as `quantize(written_bits=...)` and `balance_channels(where="written")` do. Acts when the prompt is in;
    tokens that come later stay with the highest. Of equal scores the oldest are among the highest.

    Args:
      scorer: what a slot is worth. Its statistics are kept while a prompt arrives in chunks.
      budget: tokens per KV head in the last segment, as a count or as a fraction of each row's prompt.
      sinks: first tokens of the sequence that are always among them.
      recent: newest tokens that are always among them: a count, or a fraction of the budget.

    Raises:
      TypeError: scorer is not a `Scorer`.
      ValueError: the budget cannot hold the sinks and the recent tokens.
    """
    check_scorer(scorer, "split_slots")
    always = check_protected(budget, sinks, recent)

    def observed(segment: Segment, seen: LayerObservation) -> Segment:
        return scorer.observe(with_stats(segment, scorer), seen)

    @functools.partial(jax.jit, static_argnames="slots")
    def compress(layer: LayerCache, seen: LayerObservation, rows: jax.Array, *, slots: int):
        segment = observed(dense_tail(layer, "split_slots"), seen)
        B, K, S = segment.pos.shape
        occupied = segment.pos >= 0
        scores = worth_keeping(scorer, segment, seen, is_protected(segment.pos, rows, sinks, recent))
        segment = segment.with_slots(stats={})
        if S <= slots:
            return layer.with_tail(segment)
        # Rounding of a fraction may ask a row for more than the other segment has room for.
        held = jnp.max(jnp.sum(occupied, axis=-1), axis=-1)
        index, valid = keep_highest(scores, segment.pos, slots, jnp.maximum(rows, held - (S - slots)))
        rest = segment.drop(marked(index, valid, S)).in_token_order()
        rest = rest.first(S - slots)
        rest = rest.resize(sharding.packable(S - slots, batch=B, kv_heads=K))
        return layer.replace(segments=(*layer.segments[:-1], rest, segment.take(index, valid)))

    @jax.jit
    def see(layer: LayerCache, seen: LayerObservation):
        return layer.with_tail(observed(dense_tail(layer, "split_slots"), seen))

    def init(cache: Cache, observation: Observation):
        slots = budget_slots(budget, observation.prompt_slots, always)
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots, always)
        split = lambda layer, seen: compress(layer, seen, rows, slots=slots)
        return cache.map_layers(split, observation.each_layer()), ()

    def observe(cache: Cache, observation: Observation):
        return cache.map_layers(see, observation.each_layer())

    return CacheTransform(
        init=init,
        schedule=Schedule(
            acts_in=(),
            needs=scorer.needs,
            observer=Observer(after_chunk=observe if scorer.stats else None),
            name="split_slots",
            order=Order.of(asks(scorer, "vectors slots room"), "whole aligned vectors slots", "tiers"),
        ),
    )
