"""Puts slots that were made elsewhere before every prompt."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache
from kvjax.segments.segment import Segment
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.schedule import Schedule


def prefix(layers: Sequence[tuple[jax.Array, jax.Array]]) -> CacheTransform:
    """Lets the prompt, and all that follows, attend to the same slots; tokens keep their positions.

    The slots are in a segment of their own that the rows of a batch share. Their keys are read as they are, as rotated
    keys, and their position counts as 0. Every query sees them, whatever the window of its layer. Nothing evicts them,
    and no budget counts them.

    Args:
      layers: keys and values [K, m, H] of m slots, for each layer.

    Raises:
      ValueError: they are of other layers, heads or channels than the cache (when it runs).
    """

    def put(layer: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
        tail = layer.segments[-1]
        tail.values_apart("prefix")
        (K, _, H), expected = k.shape, (tail.k.shape[1], tail.k.shape[3])
        if (K, H) != expected or v.shape != k.shape:
            raise ValueError(
                f"prefix needs keys and values of {expected[0]} heads of {expected[1]} channels, got "
                f"{list(k.shape)} and {list(v.shape)}."
            )
        k, v = (x[None].astype(tail.k.dtype) for x in (k, v))
        slots = Segment.of(k, v, jnp.zeros(k.shape[:3], jnp.int32), outside_windows=True)
        return layer.replace(segments=(slots, *layer.segments))

    def before(cache: Cache) -> Cache:
        if len(layers) != len(cache.layers):
            raise ValueError(f"prefix is of {len(layers)} layers, the cache has {len(cache.layers)}.")
        return cache.map_layers(put, *zip(*layers))

    schedule = Schedule(acts_in=(), before=before, begins=True, name="prefix")
    return CacheTransform(init=lambda cache, observation: (cache, ()), schedule=schedule)
