"""The last W queries of a sequence, kept across calls of the decoder."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments import Queries


class LayerWindow(NamedTuple):
    """One layer's last W queries, un-rotated, oldest first; padding (-1) where there were fewer."""

    raw: Float[Array, "B W N H"]
    pos: Int32[Array, "B W"]


QueryWindow = tuple[LayerWindow, ...]


def start(count: int, observation: Observation) -> QueryWindow:
    """A window of `count` queries that holds what the observation saw."""

    def empty(seen):
        B, _, N, H = seen.queries.raw.shape
        return LayerWindow(
            jnp.zeros((B, count, N, H), seen.queries.raw.dtype), jnp.full((B, count), -1, jnp.int32)
        )

    return extend(tuple(empty(seen) for seen in observation.layers), observation)


def extend(window: QueryWindow, observation: Observation) -> QueryWindow:
    """Adds the observed queries and drops the oldest."""

    return tuple(_join(*each) for each in zip(window, observation.layers, strict=True))


def observe(window: QueryWindow, cache: Cache, observation: Observation) -> Observation:
    """The observation with the window's queries, their lse computed over the cache as it is now."""

    each = zip(cache.inlined().layers, observation.layers, window, strict=True)
    return observation.replace(layers=tuple(_look(*of) for of in each))


@jax.jit
def _look(layer: LayerCache, seen: LayerObservation, old: LayerWindow) -> LayerObservation:
    queries = Queries(old.raw, old.pos, seen.queries.rope)
    lse = layer.attend(queries, window=seen.window, scale=seen.scale).lse
    return seen.replace(queries=queries, lse=lse)


@jax.jit
def _join(old: LayerWindow, seen: LayerObservation) -> LayerWindow:
    raw = jnp.concatenate([old.raw, seen.queries.raw.astype(old.raw.dtype)], axis=1)
    pos = jnp.concatenate([old.pos, seen.queries.pos], axis=1)
    order = jnp.argsort(pos, axis=1, stable=True)[:, -old.pos.shape[1] :]
    return LayerWindow(
        jnp.take_along_axis(raw, order[..., None, None], axis=1),
        jnp.take_along_axis(pos, order, axis=1),
    )
