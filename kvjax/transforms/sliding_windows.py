"""Leaves layers with a sliding window to their window."""

from __future__ import annotations

import functools

import jax

from kvjax.cache import Cache, LayerCache
from kvjax.observation import Observation
from kvjax.segments.segment import slot_tail
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.ring import as_ring
from kvjax.transforms.schedule import State


def respect_windows(transform: CacheTransform) -> CacheTransform:
    """Applies a transform to the layers that see everything; the others become rings of as many slots as they see.

    A layer with a sliding window never reads what is older: a ring of its window gives exactly the output of the full
    cache, and nothing is evicted there. What stores slots in fewer bits does so there too, slot by slot
    (`Schedule.on_ring`). Otherwise the transform sees a cache of the other layers only, so budgets are of those, what
    layers share is shared among those, and what it holds per layer must be of as many.

    Where all layers have a window, the transform gets every layer, of which attention and scores see what is inside it.

    Args:
      transform: what compresses the other layers.

    Returns:
      A transform; `transform` itself does the same for a decoder without windows.
    """

    def on_global(act):
        """`act(cache, ..., observation)` on the layers that are not bounded, with the others as they are."""

        def run(cache: Cache, *rest):
            observation, local = rest[-1], bounded_layers(rest[-1])
            others = [i for i in range(len(cache.layers)) if i not in local]
            seen = observation.replace(layers=tuple(observation.layers[i] for i in others))
            part = cache.replace(layers=tuple(cache.layers[i] for i in others))
            after = act(part, *rest[:-1], seen)
            after, *state = after if isinstance(after, tuple) else (after,)
            layers = list(cache.layers)
            for i, layer in zip(others, after.layers, strict=True):
                layers[i] = layer
            whole = after.replace(layers=tuple(layers))
            return (whole, *state) if state else whole

        return run

    outside, store = transform.map(on_global), transform.schedule.on_ring

    def init(cache: Cache, observation: Observation) -> tuple[Cache, State]:
        cache, state = outside.init(cache, observation)
        layers = list(cache.layers)
        for i in bounded_layers(observation):
            seen = observation.layers[i]
            layers[i] = _bound(layers[i], slots=observation.slots_of(seen.window, grows=False))
            if store is not None and observation.phase != "begin":
                layers[i] = store(layers[i], seen)
        return cache.replace(layers=tuple(layers)), state

    return outside._replace(init=init)


@functools.partial(jax.jit, static_argnames="slots")
def _bound(layer: LayerCache, *, slots: int) -> LayerCache:
    return layer.with_tail(as_ring(slot_tail(layer, "respect_windows"), slots, 0))


def bounded_layers(observation: Observation) -> tuple[int, ...]:
    """Indices of the layers that `respect_windows` makes rings of."""
    windows = [seen.window for seen in observation.layers]
    if None not in windows:
        return ()
    return tuple(i for i, window in enumerate(windows) if window is not None)
