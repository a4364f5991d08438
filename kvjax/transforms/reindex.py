"""Counts positions inside the cache from now on."""

from __future__ import annotations

import jax

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments.segment import dense_tail, unrotated
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule


def reindex() -> CacheTransform:
    """Stores keys un-rotated, to be rotated at every read at their rank in the layer cache, as is the query."""

    @jax.jit
    def compress(layer: LayerCache, seen: LayerObservation) -> LayerCache:
        slots = unrotated(dense_tail(layer, "reindex"), seen.queries.rope)
        return layer.with_tail(slots.replace(key_rope="rank"))

    def init(cache: Cache, observation: Observation):
        return cache.map_layers(compress, observation.layers), ()

    order = Order.of(needs="vectors slots room", loses="rotated places whole")
    return CacheTransform(init=init, schedule=Schedule(acts_in=(), name="reindex", order=order))
