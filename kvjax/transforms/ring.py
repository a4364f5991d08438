"""Keeps attention sinks and a ring of the newest tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.budget import Budget, budget_rows, budget_slots, check_budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import Observation
from kvjax.segments.layouts import Ring
from kvjax.segments.segment import Segment, slot_tail
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule


def as_ring(segment: Segment, slots: int, sinks: int, rows: jax.Array | None = None) -> Segment:
    """The sinks and the newest slots, i32[B] `rows` of `slots` (None: all), in a segment that overwrites its oldest."""
    if segment.pos.shape[2] < slots:
        segment = segment.resize(slots)
    rows = jnp.full(segment.pos.shape[:1], slots) if rows is None else jnp.minimum(rows, slots)
    return segment.replace(layout=Ring(sinks)).newest(rows, slots)


def ring(budget: Budget, *, sinks: int = 4, reindexed: bool = False) -> CacheTransform:
    """Keeps tokens `0 .. sinks - 1` and the newest `budget - sinks`, in a segment that overwrites its oldest.

    Memory never grows, in prefill or decode, and no slot is spent on slack.

    Args:
      budget: tokens per KV head, sinks included, as a count or as a fraction of each row's prompt; a fraction is never
        less than the sinks and one token.
      sinks: first tokens that are never overwritten.
      reindexed: positions are counted inside the cache; False keeps them as they are.

    Raises:
      ValueError: the budget is no larger than the sinks.
    """
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}.")
    check_budget(budget, at_least=sinks + 1, holds=f"{sinks} sinks and one recent token")

    @functools.partial(jax.jit, static_argnames="slots")
    def compress(layer: LayerCache, rows: jax.Array, *, slots: int) -> LayerCache:
        segment = as_ring(slot_tail(layer, "ring"), slots, sinks, rows)
        if sinks and reindexed and segment.key_rope == "stored":
            segment = segment.replace(key_rope="window")
        return layer.with_tail(segment)

    def init(cache: Cache, observation: Observation):
        slots = budget_slots(budget, observation.prompt_slots, sinks + 1)
        slots = observation.slots_of(slots, grows=False)  # a ring never does
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots, sinks + 1)
        return cache.map_layers(functools.partial(compress, rows=rows, slots=slots)), ()

    # Ranks differ as positions do where the newest tokens follow each other: nothing has chosen among them.
    needs, loses = ("slots room whole", "whole room places") if sinks and reindexed else ("slots room", "whole room")
    return CacheTransform(
        init=init,
        schedule=Schedule(
            acts_in=(),  # the segment does
            frees_in_prefill=1,
            frees_in_decode=1,
            budget=budget,
            at_least=sinks + 1,
            name="ring",
            order=Order.of(needs, loses),
        ),
    )
