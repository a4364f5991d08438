"""Stores slots as coordinates in bases: projected per head, jointly over heads, or as some of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Needs, Observation, newest
from kvjax.segments import BlockedSegment, HeadsSegment, LatentSegment, Segment
from kvjax.segments.bases import Basis, Channels, Matrix
from kvjax.segments.hadamard import Hadamard
from kvjax.segments.protocol import KeyRope
from kvjax.segments.segment import dense_tail, unrotated
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule

LayerBases = tuple[Basis | None, Basis | None]
"""Bases of the keys and of the values of a layer; None leaves them as they are."""


def rotate_channels(seed: int) -> CacheTransform:
    """Stores rotated keys, and values, in coordinates that spread each channel over all: Hadamard with random signs.

    Exact by itself, and no bytes: codes that follow find numbers that are nearly normal, whatever the channels were.

    Args:
      seed: of the signs, the same for every layer and head.

    Raises:
      ValueError: a head's channels are not a power of two (at `init`).
    """
    basis = Hadamard(seed=seed)

    def of(slots: Segment) -> LatentSegment:
        return LatentSegment.of(slots, basis, None if slots.v is None else basis)

    rotate = jax.jit(lambda layer: layer.map_dense(of, of))

    def init(cache: Cache, observation: Observation):
        return (cache, ()) if observation.phase == "begin" else (cache.map_layers(rotate), ())

    order = Order.of(needs="numbers channels rotated places own heads", loses="vectors slots whole channels")
    on_ring = lambda layer, seen: rotate(layer)
    schedule = Schedule(acts_in=(), begins=True, name="rotate_channels", order=order, on_ring=on_ring)
    return CacheTransform(init, schedule=schedule)


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

    loses = "vectors slots whole channels" + " rotated" * (key_rope != "stored")
    order = Order.of("vectors slots room places" + " aligned" * bool(mixed), loses)
    return CacheTransform(init=init, schedule=Schedule(acts_in=(), begins=True, name="project", order=order))


class HeadBases(NamedTuple):
    """Bases of some KV heads of a layer, all of one rank."""

    heads: tuple[int, ...]
    key: Basis | None
    value: Basis | None


def by_rank(key: Matrix, value: Matrix, key_ranks: Sequence[int], value_ranks: Sequence[int]) -> list[HeadBases]:
    """Cuts the bases of a layer to the ranks of each KV head, and puts heads of equal ranks together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for head, ranks in enumerate(zip(map(int, key_ranks), map(int, value_ranks), strict=True)):
        groups.setdefault(ranks, []).append(head)
    return [HeadBases(tuple(h), key.cut(h, k), value.cut(h, v)) for (k, v), h in sorted(groups.items())]


def project_by_head(groups: Sequence[Sequence[HeadBases]]) -> CacheTransform:
    """`project` with ranks of their own for each KV head: every head stores as many coordinates as its basis has.

    Args:
      groups: of each layer, together all of its heads; see `by_rank`.

    Raises:
      ValueError: the cache has another number of layers (at `init`), or heads are missing or named twice (at
        build).
    """
    for layer in groups:
        named = sorted(head for group in layer for head in group.heads)
        if named != list(range(len(named))):
            raise ValueError(f"groups of a layer must name each of its heads once, got {named}.")

    def split(layer: LayerCache, bases: list[LayerBases], heads: tuple[tuple[int, ...], ...]) -> LayerCache:
        dense = dense_tail(layer, "project_by_head")
        if sum(map(len, heads)) != dense.pos.shape[1]:
            raise ValueError(f"groups are of {sum(map(len, heads))} heads, but the cache has {dense.pos.shape[1]}.")
        if len(heads) == 1:
            return layer.with_tail(LatentSegment.of(dense, *bases[0]))
        encode = lambda part, index: LatentSegment.of(part, *bases[index])
        return layer.with_tail(HeadsSegment.of(dense, heads, encode))

    compress = jax.jit(split, static_argnums=2)

    def init(cache: Cache, observation: Observation):
        bases = [[(group.key, group.value) for group in layer] for layer in groups]
        heads = [tuple(group.heads for group in layer) for layer in groups]
        return cache.map_layers(compress, _of_all_layers(bases, cache), heads), ()

    order = Order.of(needs="vectors slots room places", loses="vectors slots whole channels")
    return CacheTransform(init=init, schedule=Schedule(acts_in=(), begins=True, name="project", order=order))


def check_rank(name: str, rank: int | float, channels: int) -> int:
    """A rank as a count: itself, or a fraction of the channels.

    Raises:
      ValueError: it is above the channels, or below one.
    """
    count = int(rank * channels) if isinstance(rank, float) else rank
    if not 1 <= count <= channels:
        raise ValueError(f"{name} must be from 1 to the {channels} channels of a head, got {rank}.")
    return count


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
        return layer.with_tail(BlockedSegment.from_dense(slots, encode, window))

    def init(cache: Cache, observation: Observation):
        return cache.map_layers(compress, observation.layers, _of_all_layers(bases, cache)), ()

    order = Order.of(needs="vectors slots room aligned places", loses="vectors slots whole channels rotated")
    return CacheTransform(init=init, schedule=Schedule(acts_in=(), begins=True, name="project_jointly", order=order))


def project_by_group(
    bases: Sequence[Sequence[LayerBases]], groups: Sequence[tuple[int, ...]]
) -> CacheTransform:
    """Stores un-rotated keys, and values, of some heads of a layer together as one vector of coordinates a token.

    Keys are expanded and rotated tile by tile when read; tokens that follow are projected at once.

    Args:
      bases: of each layer and group; the coordinates of a token are the sum over the heads of the group.
      groups: the KV heads of each, together all.

    Raises:
      ValueError: heads are missing or named twice (at build), or the cache has another number of layers or heads.
    """
    named = sorted(head for group in groups for head in group)
    if named != list(range(len(named))):
        raise ValueError(f"groups must name each head once, got {tuple(groups)}.")

    @jax.jit
    def compress(layer: LayerCache, seen: LayerObservation, bases: list[LayerBases]) -> LayerCache:
        slots = unrotated(dense_tail(layer, "project_by_group"), seen.queries.rope)
        if len(named) != slots.pos.shape[1]:
            raise ValueError(f"groups are of {len(named)} heads, but the cache has {slots.pos.shape[1]}.")
        if len(groups) == 1:
            return layer.with_tail(LatentSegment.of(slots, *bases[0], joint=True))
        encode = lambda part, index: LatentSegment.of(part, *bases[index], joint=True)
        return layer.with_tail(HeadsSegment.of(slots, tuple(groups), encode))

    def init(cache: Cache, observation: Observation):
        return cache.map_layers(compress, observation.layers, _of_all_layers(bases, cache)), ()

    order = Order.of(needs="vectors slots room aligned", loses="vectors slots whole channels rotated")
    return CacheTransform(init=init, schedule=Schedule(acts_in=(), name="project_by_group", order=order))


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
        older, whole = slots.with_slots(stats={}).split_newest(recent)
        pruned = LatentSegment.of(older, Channels(index, H), None)
        return layer.replace(segments=(*layer.segments[:-1], pruned, whole))

    def init(cache: Cache, observation: Observation):
        return cache.map_layers(compress, observation.layers), ()

    order = Order.of(needs="vectors slots room places", loses="vectors slots whole channels")
    needs = Needs(queries=queries)
    return CacheTransform(init=init, schedule=Schedule(acts_in=(), needs=needs, name="prune_channels", order=order))


def _strongest_channels(slots: Segment, seen: LayerObservation, keep: int) -> jax.Array:
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
