"""Consecutive layers share one low-rank vector of coordinates a token; each keeps a basis to read it with."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments import LatentSegment, Segment, SharedView
from kvjax.segments.bases import Matrix
from kvjax.segments.segment import dense_tail, unrotated
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule

_ITERATIONS = 6  # of the subspace: where singular values fall by 3% a step, the error is 1% above the least possible


def share_basis(layers: int, key_rank: int | float, value_rank: int | float) -> CacheTransform:
    """Factors the prompt's un-rotated keys of `layers` consecutive layers, and their values, as `A [B_1 | B_2 | ...]`.

    `A` is the best approximation of that rank of all heads of the group side by side. It is stored once, in
    `Cache.shared`; each layer keeps its columns. Keys are expanded and rotated tile by tile when read. Tokens that
    follow the prompt stay exact. Layers that are left over make a smaller group.

    Where the keys are the values (multi-head latent attention) one factorisation serves both, of the larger rank.

    Args:
      layers: of a group.
      key_rank: length of a token's key coordinates: a count, or a fraction of the channels of all heads of the group.
        A prompt of fewer tokens needs no more than it has.
      value_rank: the same for values.

    Raises:
      ValueError: a group of no layers or a rank of nothing (at build); a rank above the group's width (at `init`).
    """
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}.")
    for name, rank in (("key_rank", key_rank), ("value_rank", value_rank)):
        if rank <= 0 or (isinstance(rank, float) and rank > 1):
            raise ValueError(f"{name} must be a count of at least 1 or a fraction in (0, 1], got {rank}.")

    @jax.jit
    def compress(group: tuple[LayerCache, ...], seen: tuple[LayerObservation, ...]):
        slots = [unrotated(dense_tail(c, "share_basis"), s.queries.rope) for c, s in zip(group, seen)]
        pos, width = slots[0].pos[:, :1], len(group) * slots[0].k.shape[1] * slots[0].k.shape[3]
        key_count, value_count = _count(key_rank, width), _count(value_rank, width)
        if slots[0].v is None:
            keys, bases = _factors([s.k for s in slots], pos, max(key_count, value_count))
            return Segment.of(keys, None, pos), [(Matrix(k), None) for k in bases]
        keys, key_bases = _factors([s.k for s in slots], pos, key_count)
        values, value_bases = _factors([s.v for s in slots], pos, value_count)
        bases = [(Matrix(k), Matrix(v)) for k, v in zip(key_bases, value_bases)]
        return Segment.of(keys, values, pos), bases

    def init(cache: Cache, observation: Observation):
        new, shared = [], dict(cache.shared)
        for first in range(0, len(cache.layers), layers):
            group = cache.layers[first : first + layers]
            _, K, _, H = dense_tail(group[0], "share_basis").k.shape
            for name, rank in (("key_rank", key_rank), ("value_rank", value_rank)):
                if isinstance(rank, int) and rank > layers * K * H:
                    raise ValueError(f"{name} must be at most the {layers * K * H} channels of a group, got {rank}.")
            name = f"layers {first} to {first + len(group) - 1}"
            shared[name], bases = compress(group, observation.layers[first : first + layers])
            for layer, of_layer in zip(group, bases):
                own_values = shared[name].v is not None
                view = LatentSegment(None, *of_layer, K, "at_attend", joint=True, own_values=own_values)
                view = SharedView(view, "latent", name)
                *before, tail = layer.segments
                new.append(layer.replace(segments=(*before, view, tail.no_slots())))
        return cache.replace(layers=tuple(new), shared=shared), ()

    order = Order.of(needs="whole vectors", loses="whole vectors slots channels own")
    schedule = Schedule(acts_in=(), name="share_basis", order=order)
    return CacheTransform(init=init, schedule=schedule)


def _count(rank: int | float, width: int) -> int:
    """Coordinates of a group whose tokens have `width` channels; a last, smaller group may have fewer."""
    return max(1, int(rank * width)) if isinstance(rank, float) else min(rank, width)


def _factors(parts: Sequence[jax.Array], pos: jax.Array, count: int) -> tuple[jax.Array, list[jax.Array]]:
    """The coordinates that layers share, of unit variance, and each layer's basis.

    Args:
      parts: [B, K, S, H], keys or values of each layer.
      pos: i32[B, 1, S].
      count: [R], at most; no more than tokens.

    Returns:
      `([B, 1, S, R], [[B, K, H, R]])`. Coordinates of equal variance lose least where they are quantized together.
    """
    B, K, S, H = parts[0].shape
    width = len(parts) * K * H
    x = jnp.stack([part.swapaxes(1, 2) for part in parts], axis=2).astype(jnp.float32)  # [B, S, layers, K, H]
    there = pos[:, 0, :, None] >= 0
    x = jnp.where(there, x.reshape(B, S, width), 0.0)
    axes = principal_axes(x, min(count, S))
    coordinates = jnp.matmul(x, axes, precision="highest")
    tokens = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
    size = jnp.sqrt(jnp.sum(coordinates**2, axis=1, keepdims=True) / tokens)  # [B, 1, R]
    size = jnp.where(size > 0, size, 1.0)
    bases = (axes * size).reshape(B, len(parts), K, H, -1)
    dtype = parts[0].dtype
    of_bases = jnp.float32 if dtype.itemsize == 1 else dtype  # bases go beyond the range of 8-bit floats
    return (coordinates / size)[:, None].astype(dtype), [bases[:, i].astype(of_bases) for i in range(len(parts))]


def principal_axes(x: jax.Array, rank: int) -> Float32[Array, "B W R"]:
    """f32[B, W, R]: orthonormal, spanning the leading right singular vectors of f32[B, S, W].

    Subspace iteration from a fixed start: products and thin QR only, which every accelerator runs well.
    """
    gram = jnp.einsum("bsv,bsw->bvw", x, x, precision="highest")
    start = jax.random.normal(jax.random.key(0), (x.shape[-1], rank), jnp.float32)
    refine = lambda _, axes: jnp.linalg.qr(jnp.matmul(gram, axes, precision="highest"))[0]
    return jax.lax.fori_loop(0, _ITERATIONS, refine, jnp.broadcast_to(start, (x.shape[0], *start.shape)))
