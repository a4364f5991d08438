"""Keeps attention sinks and a ring of the newest tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.budget import Budget, budget_rows, budget_slots, check_budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments.layouts import Ring
from kvjax.segments.protocol import KeyRope
from kvjax.segments.segment import Segment, slot_tail, unrotated
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule


def as_ring(segment: Segment, slots: int, sinks: int, rows: jax.Array | None = None) -> Segment:
    """The sinks and the newest slots, i32[B] `rows` of `slots` (None: all), in a segment that overwrites its oldest."""
    if segment.pos.shape[2] < slots:
        segment = segment.resize(slots)
    rows = jnp.full(segment.pos.shape[:1], slots) if rows is None else jnp.minimum(rows, slots)
    return segment.replace(layout=Ring(sinks)).newest(rows, slots)


def ring(budget: Budget, *, sinks: int = 4, key_rope: KeyRope = "stored") -> CacheTransform:
    """Keeps tokens `0 .. sinks - 1` and the newest `budget - sinks`, in a segment that overwrites its oldest.

    Memory never grows, in prefill or decode, and no slot is spent on slack.

    Args:
      budget: tokens per KV head, sinks included, as a count or as a fraction of each row's prompt; a fraction is never
        less than the sinks and one token.
      sinks: first tokens that are never overwritten.
      key_rope: "stored" keeps positions as they are; "rank" re-indexes them inside the cache.

    Raises:
      ValueError: the budget is no larger than the sinks.
    """
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}.")
    check_budget(budget, at_least=sinks + 1, holds=f"{sinks} sinks and one recent token")

    @functools.partial(jax.jit, static_argnames="slots")
    def compress(layer: LayerCache, seen: LayerObservation, rows: jax.Array, *, slots: int) -> LayerCache:
        segment = as_ring(slot_tail(layer, "ring"), slots, sinks, rows)
        if key_rope not in ("stored", segment.key_rope):
            segment = unrotated(segment, seen.queries.rope).replace(key_rope=key_rope)
        return layer.with_tail(segment)

    def init(cache: Cache, observation: Observation):
        slots = budget_slots(budget, observation.prompt_slots, sinks + 1)
        slots = observation.slots_of(slots, grows=False)  # a ring never does
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots, sinks + 1)
        shrink = lambda layer, seen: compress(layer, seen, rows, slots=slots)
        return cache.map_layers(shrink, observation.layers), ()

    turned = key_rope != "stored"
    loses = "whole room" + " rotated" * turned + " places" * (key_rope == "rank")
    return CacheTransform(
        init=init,
        schedule=Schedule(
            acts_in=(),  # the segment does
            frees_in_prefill=1,
            frees_in_decode=1,
            budget=budget,
            at_least=sinks + 1,
            name="ring",
            order=Order.of("slots room" + " vectors" * turned, loses),
        ),
    )
