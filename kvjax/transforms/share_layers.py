"""Layers that read the slots of other layers in place of their own."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from kvjax.cache import Cache, LayerCache
from kvjax.observation import Observation
from kvjax.segments import Segment, SlotsView
from kvjax.segments.segment import dense_tail
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule


def share_layers(givers: Sequence[int]) -> CacheTransform:
    """Drops the prompt's keys and values of some layers: these read those of another layer.

    What is shared is stored once, in `Cache.shared`. Tokens that follow are every layer's own.

    Args:
      givers: for each layer the one whose slots it reads; itself: its own.

    Raises:
      ValueError: a giver is no layer, or reads those of another one (at build); another number of layers (at `init`).
    """
    givers = tuple(int(giver) for giver in givers)
    for layer, giver in enumerate(givers):
        if not 0 <= giver < len(givers) or givers[giver] != giver:
            raise ValueError(f"givers must be layers that read their own slots, got {giver} for layer {layer}.")

    @jax.jit
    def given(layer: LayerCache) -> tuple[Segment, Segment]:
        slots = dense_tail(layer, "share_layers").with_slots(stats={})
        return slots, slots.no_slots()

    def init(cache: Cache, observation: Observation):
        if len(givers) != len(cache.layers):
            raise ValueError(f"givers are of {len(givers)} layers, but the cache has {len(cache.layers)}.")
        layers, shared = list(cache.layers), dict(cache.shared)
        for layer, giver in enumerate(givers):
            if givers.count(giver) == 1:
                continue
            name, (slots, tail) = f"layer {giver}", given(layers[layer])
            if layer == giver:
                shared[name] = slots
            layers[layer] = layers[layer].replace(segments=(*layers[layer].segments[:-1], SlotsView(name), tail))
        return cache.replace(layers=tuple(layers), shared=shared), ()

    order = Order.of(needs="whole vectors room own", loses="whole vectors slots channels own")
    return CacheTransform(init=init, schedule=Schedule(acts_in=(), name="share_layers", order=order))
