"""Stores slots as coordinates in bases: projected per head, jointly over heads, or as some of the channels."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Needs, Observation, newest
from kvjax.segments import BufferedSegment, DenseSegment, LatentSegment
from kvjax.segments.dense import dense_tail, unrotated
from kvjax.segments.latent import Basis, Channels
from kvjax.segments.protocol import KeyRope
from kvjax.transforms.base import PLAIN, CacheTransform

LayerBases = tuple[Basis | None, Basis | None]
"""Bases of the keys and of the values of a layer; None leaves them as they are."""


def project(bases: Sequence[LayerBases], *, key_rope: KeyRope = "stored") -> CacheTransform:
    """Stores keys and values as coordinates in fixed bases; tokens that follow are projected at once.

    Attention runs in the reduced space: queries are projected, values expanded after the weighted sum. Un-rotated
    keys are expanded and rotated tile by tile instead.

    Args:
      bases: of each layer, for each KV head its own.
      key_rope: "stored" projects rotated keys, "at_attend" un-rotated ones.

    Raises:
      ValueError: bases mix heads where they are read one by one (at build); the cache has another number of layers.
    """
    if key_rope not in ("stored", "at_attend"):
        raise ValueError(f"key_rope must be 'stored' or 'at_attend', got {key_rope!r}.")
    mixing = [{name for name, b in zip(("keys", "values"), pair) if b is not None and b.mixes_heads} for pair in bases]
    mixed = set().union(*mixing)
    if "values" in mixed or (mixed and key_rope == "stored"):
        raise ValueError("bases that mix heads suit only keys with key_rope='at_attend': others are read head by head.")

    @jax.jit
    def compress(layer: LayerCache, seen: LayerObservation, bases: LayerBases) -> LayerCache:
        slots = dense_tail(layer, "project")
        if key_rope == "at_attend":
            slots = unrotated(slots, seen.queries.rope)
        return layer.with_tail(LatentSegment.of(slots, *bases))

    def init(cache: Cache, observation: Observation):
        return cache.map_layers(compress, observation.layers, _of_all_layers(bases, cache)), ()

    return CacheTransform(init=init, name="project", takes=("plain",) if mixed else PLAIN, leaves="projected")


def project_jointly(bases: Sequence[LayerBases], *, window: int = 32) -> CacheTransform:
    """Stores un-rotated keys, and values, of all heads of a layer as one vector of coordinates a token.

    Keys are expanded and rotated tile by tile when read. The newest tokens stay exact until `window` of them
    are projected together.

    Args:
      bases: of each layer; the coordinates of a token are the sum over its KV heads.
      window: tokens of a block, and the most that are kept exact.

    Raises:
      ValueError: the cache has another number of layers, or window is below 1.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}.")

    @jax.jit
    def compress(layer: LayerCache, seen: LayerObservation, bases: LayerBases) -> LayerCache:
        slots = unrotated(dense_tail(layer, "project_jointly"), seen.queries.rope)
        encode = lambda block: LatentSegment.of(block, *bases, joint=True)
        return layer.with_tail(BufferedSegment.from_dense(slots, encode, window))

    def init(cache: Cache, observation: Observation):
        return cache.map_layers(compress, observation.layers, _of_all_layers(bases, cache)), ()

    return CacheTransform(init=init, name="project_jointly", takes=("plain",), leaves="joint")


def prune_channels(prune: float, *, queries: int = 32, recent: int = 32) -> CacheTransform:
    """Drops the key channels that contribute least to the last queries' logits; values stay whole.

    A channel's score is `mean_t k_t^2 * mean_q q^2`, over the tokens of a row and its last queries, averaged
    over the query group. The newest tokens, and all that follow, keep every channel.

    Args:
      prune: fraction of the channels to drop.
      queries: how many of the last queries are looked at.
      recent: newest tokens that are left whole.

    Raises:
      ValueError: prune is outside [0, 1), or queries or recent are below 1.
    """
    if not 0 <= prune < 1:
        raise ValueError(f"prune must be in [0, 1), got {prune}.")
    if queries < 1 or recent < 1:
        raise ValueError(f"queries and recent must be at least 1, got {queries} and {recent}.")

    @jax.jit
    def compress(layer: LayerCache, seen: LayerObservation) -> LayerCache:
        slots = dense_tail(layer, "prune_channels")
        B, K, S, H = slots.k.shape
        index = _strongest_channels(slots, newest(seen, queries), H - int(prune * H))
        older, whole = slots.replace(stats={}).split_newest(recent)
        pruned = LatentSegment.of(older, Channels(index, H), None)
        return layer.replace(segments=(*layer.segments[:-1], pruned, whole))

    def init(cache: Cache, observation: Observation):
        return cache.map_layers(compress, observation.layers), ()

    return CacheTransform(
        init=init, needs=Needs(queries=queries), name="prune_channels", takes=PLAIN, leaves="pruned"
    )


def _strongest_channels(slots: DenseSegment, seen: LayerObservation, keep: int) -> jax.Array:
    """i32[B, K, keep], in channel order."""
    B, K, S, H = slots.k.shape
    mean_square = lambda x, there, axes: jnp.sum(jnp.where(there, x.astype(jnp.float32) ** 2, 0.0), axis=axes)
    of_keys = mean_square(slots.k, (slots.pos >= 0)[..., None], 2)  # sums rank as means do
    q = seen.queries.rotated.reshape(B, -1, K, seen.queries.raw.shape[2] // K, H)
    of_queries = mean_square(q, (seen.queries.pos >= 0)[:, :, None, None, None], (1, 3))
    _, index = jax.lax.top_k(of_keys * of_queries, keep)
    return jnp.sort(index, axis=-1)


def _of_all_layers(bases: Sequence[LayerBases], cache: Cache) -> Sequence[LayerBases]:
    if len(bases) != len(cache.layers):
        raise ValueError(f"bases are of {len(bases)} layers, but the cache has {len(cache.layers)}.")
    return bases
