"""Attaches what was read elsewhere: a shared prompt, contexts side by side, the trunk of a tree."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.schedule import Schedule


def before(attached: Cache) -> CacheTransform:
    """Lets the prompt, and all that follows, attend to a cache that was read elsewhere; its tokens come first.

    Its b rows serve a batch of B, a multiple of b: row `i` the rows `i B / b .. (i + 1) B / b - 1`, whose queries
    attend to it in one product. It is stored once, so its bytes do not depend on B. Positions go on behind it. A run
    that was read behind an attached cache holds that too, with its own number of rows: attached again, it is a branch
    of a tree, to any depth.

    Nothing evicts its slots and no budget counts them; what compresses whole prompts by a position's place, and what
    stores slots as codes, does so to them as well where they are arrays. It lives in the cache it was read for: leave
    room of 0 for it, or its empty slots are attached too.

    Args:
      attached: read by the same decoder.

    Returns:
      A transform that goes first in a `chain`.

    Raises:
      ValueError: it is of other layers or heads, its rows do not divide the batch, or rows that are shared are counted
        by rank (when it runs).

    Source: Juravsky et al., Hydragen (2024), arXiv:2402.05099.
    """

    def put(layer: LayerCache, of: LayerCache) -> LayerCache:
        return layer.replace(segments=(*of.segments, *layer.segments))

    def attach(cache: Cache) -> Cache:
        _check_fits(cache, attached)
        named = with_other_names(attached, cache.shared)
        rows, batch = attached.length.shape[0], cache.length.shape[0]
        length = cache.length + jnp.repeat(attached.length, batch // rows)
        both = cache.map_layers(put, named.layers)
        return both.replace(length=length, shared={**named.shared, **cache.shared})

    schedule = Schedule(acts_in=(), before=attach, begins=True, name="before")
    return CacheTransform(init=lambda cache, observation: (cache, ()), schedule=schedule)


def with_other_names(cache: Cache, taken) -> Cache:
    """Renames what layers share, so that nothing in `taken`, nor what a transform shares later, has its name."""
    names = {}
    for name in cache.shared:
        other = f"{name} attached"
        while other in taken or other in names.values():
            other += "'"
        names[name] = other
    rename = lambda s: s.replace(name=names[s.name]) if hasattr(s, "inlined") else s
    renamed = cache.map_layers(lambda layer: layer.replace(segments=tuple(map(rename, layer.segments))))
    return renamed.replace(shared={names[name]: segment for name, segment in cache.shared.items()})


def _check_fits(cache: Cache, attached: Cache) -> None:
    if len(attached.layers) != len(cache.layers):
        raise ValueError(f"before: the cache has {len(attached.layers)} layers, the decoder {len(cache.layers)}.")
    rows, batch = attached.length.shape[0], cache.length.shape[0]
    if batch % rows:
        raise ValueError(f"before: {batch} rows of a batch must be a multiple of the {rows} rows that were attached.")
    for layer, own in zip(attached.inlined().layers, cache.inlined().layers):
        for segment in layer.segments:
            if segment.key_rope == "rank" and rows != batch:
                raise ValueError("before: a cache whose tokens are counted by rank has a row for each of the batch.")
            if getattr(segment, "selects", False) and rows != batch:
                raise ValueError("before: a cache whose pages queries choose has a row for each of the batch.")
        heads, of = layer.segments[-1].pos.shape[1], own.segments[-1].pos.shape[1]
        if heads != of:
            raise ValueError(f"before: the cache has {heads} KV heads, the decoder {of}.")
