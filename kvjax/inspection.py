"""Looks into a cache from outside of jit: which tokens survived where, and what other ways to store them would take."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, LayerCache
from kvjax.segments import Segment


def held_positions(cache: Cache, row: int = 0) -> list[list[np.ndarray]]:
    """Token positions that each layer and KV head holds, sorted: `[layer][head] -> i32[n]`.

    Args:
      cache: with real arrays.
      row: of the batch.
    """
    layers = []
    for layer in cache.inlined().layers:
        K = layer.segments[-1].pos.shape[1]
        heads: list[list[np.ndarray]] = [[] for _ in range(K)]
        for segment in layer.segments:
            pos, owners = np.asarray(segment.pos), range(K)
            if hasattr(segment, "owner"):  # pages, with the KV head of each
                owners = np.asarray(segment.owner[row])
                pos = pos.reshape(len(pos), len(owners), -1)
            for head, part in zip(owners, pos[row if len(pos) > 1 else 0], strict=True):  # a prefix may be of all rows
                heads[head].append(part[part >= 0])
        layers.append([np.sort(np.concatenate(parts)) for parts in heads])
    return layers


def masked(full: Cache, held: Sequence[Sequence[np.ndarray]]) -> Cache:
    """The full cache of one row with every token empty that a head does not hold: hides, frees nothing.

    Args:
      full: a dense segment a layer, batch of one.
      held: as `held_positions` returns it.
    """
    return _rewrite(full, held, lambda segment, keep: segment.drop(~keep))


def padded(full: Cache, held: Sequence[Sequence[np.ndarray]]) -> Cache:
    """The same tokens in dense segments, every head as long as the longest of its layer."""

    def pad(segment: Segment, keep: jax.Array) -> Segment:
        longest = int(jnp.max(jnp.sum(keep, axis=-1)))
        order = jnp.argsort(~keep, axis=-1, stable=True)[..., :longest]
        return segment.take(order, jnp.take_along_axis(keep, order, axis=-1))

    return _rewrite(full, held, pad)


def _rewrite(full: Cache, held, rewrite) -> Cache:
    def one(layer: LayerCache, heads) -> LayerCache:
        segments = layer.segments
        if len(segments) != 1 or not getattr(segments[0], "is_plain", False) or segments[0].pos.shape[0] != 1:
            raise ValueError("full must be an uncompressed cache of one row.")
        segment = segments[0]
        pos = np.asarray(segment.pos[0])
        keep = np.stack([np.isin(of_head, tokens) for of_head, tokens in zip(pos, heads, strict=True)])
        return layer.with_tail(rewrite(segment, jnp.asarray(keep)[None]))

    return full.map_layers(one, held)
