"""Keeps everything for some KV heads, and sinks with a window for the others."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from kvjax.budget import budget_rows, budget_slots
from kvjax.cache import Cache, LayerCache
from kvjax.observation import Observation
from kvjax.segments import CompensatedSegment, HeadsSegment
from kvjax.segments.segment import dense_tail
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.ring import as_ring
from kvjax.transforms.schedule import Schedule


def split_heads(
    full: Sequence[Sequence[int]],
    *,
    sinks: int = 64,
    recent: int = 256,
    fraction: float = 0.0,
    compensate: bool = False,
) -> CacheTransform:
    """Leaves the `full` heads of each layer as they are and makes rings of the others.

    Args:
      full: KV heads of each layer that keep every token.
      sinks: first tokens that a ring keeps.
      recent: newest tokens that a ring keeps.
      fraction: the newest tokens are this fraction of each row's prompt where that is more than `recent`.
      compensate: what a ring drops, then and later, stays as the mean of its keys and values (`CompensatedSegment`).

    Raises:
      ValueError: sinks, recent or fraction make no sense (at build); the cache has other layers or heads (at
        `init`).
    """
    if sinks < 0 or recent < 1:
        raise ValueError(f"sinks must be at least 0 and recent at least 1, got {sinks} and {recent}.")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}.")
    full = tuple(tuple(sorted({int(head) for head in heads})) for heads in full)

    def split(layer: LayerCache, rows: jax.Array, heads: tuple[int, ...], slots: int) -> LayerCache:
        dense = dense_tail(layer, "split_heads")
        K = dense.pos.shape[1]
        if heads and not 0 <= heads[0] <= heads[-1] < K:
            raise ValueError(f"full names head {heads[-1]}, but a layer has heads 0 to {K - 1}.")
        others = tuple(head for head in range(K) if head not in heads)

        def encode(part, index):
            if index == 0:
                return part
            ring = as_ring(part, slots, sinks, rows)
            return CompensatedSegment.of(part, ring) if compensate else ring

        return layer.with_tail(HeadsSegment.of(dense, (heads, others), encode))

    compress = jax.jit(split, static_argnums=(2, 3))

    def init(cache: Cache, observation: Observation):
        if len(full) != len(cache.layers):
            raise ValueError(f"full is for {len(full)} layers, but the cache has {len(cache.layers)}.")
        slots = sinks + budget_slots(float(fraction), observation.prompt_slots, recent)
        slots = observation.slots_of(slots, grows=False)  # a ring never does
        rows = sinks + budget_rows(float(fraction), observation.prompt, observation.prompt_slots, recent)
        each = lambda layer, heads: compress(layer, rows, tuple(heads), slots)
        return cache.map_layers(each, full), ()

    order = Order.of(needs="vectors slots room places", loses="whole aligned vectors slots")
    schedule = Schedule(acts_in=(), begins=True, name="split_heads", order=order)
    return CacheTransform(init=init, schedule=schedule)
