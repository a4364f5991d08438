"""Exempts a few slots from what a transform does to the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments.segment import dense_tail
from kvjax.segments.slots import keep_highest, marked, priority
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.evict import Scorer, asks, check_scorer, slot_scores
from kvjax.transforms.order import Order


def protect(transform: CacheTransform, scorer: Scorer, slots: int) -> CacheTransform:
    """Moves the highest-scored slots of the prompt into a dense segment of their own and transforms the rest.

    Args:
      transform: acts on the rest, once: wrap it in `at_prefill_end` where it acts later, too.
      scorer: what a slot is worth; where it says -inf or NaN a slot is not protected, however few there are.
      slots: of a KV head that are protected, at most.

    Raises:
      TypeError: scorer is not a `Scorer`.
      ValueError: slots is negative; the transform acts later, or it needs what the scorer does not give: the same
        tokens in every head.
    """
    check_scorer(scorer, "protect")
    if slots < 0:
        raise ValueError(f"slots must be at least 0, got {slots}.")
    schedule = transform.schedule
    if schedule.acts_in:
        raise ValueError(f"protect needs a transform that acts once, at the prompt's end; {schedule.name} acts later.")
    if scorer.stats:
        raise ValueError("protect needs a scorer without statistics: it acts once, at the prompt's end.")
    if not scorer.aligned and "aligned" in schedule.order.needs:
        raise ValueError(f"{schedule.name} needs the same tokens in every head; this scorer protects others in each.")

    @jax.jit
    def split(layer: LayerCache, seen: LayerObservation):
        segment = dense_tail(layer, "protect")
        scores = slot_scores(scorer, segment, seen)
        worthy = jnp.where(scores > -jnp.inf, segment.pos, -1)
        index, valid = keep_highest(priority(scores, worthy), worthy, min(slots, segment.pos.shape[2]))
        rest = segment.drop(marked(index, valid, segment.pos.shape[2]))
        return layer.with_tail(rest), segment.take(index, valid).resize(slots)

    def init(cache: Cache, observation: Observation):
        if slots == 0 or observation.phase == "begin":
            return transform.init(cache, observation)
        parts = [split(*of) for of in zip(cache.layers, observation.layers, strict=True)]
        rest, state = transform.init(cache.replace(layers=tuple(layer for layer, _ in parts)), observation)
        add = lambda layer, part: layer.replace(segments=(part[1], *layer.segments))
        return rest.map_layers(add, parts), state

    order = schedule.order._replace(needs=schedule.order.needs | Order.of(asks(scorer, "vectors slots room")).needs)
    needs = schedule.needs.union(scorer.needs)
    return transform._replace(init=init, schedule=schedule._replace(needs=needs, name="protect", order=order))
