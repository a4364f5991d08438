"""The extremes of a tensor, kept apart from it: their indices, and what to add there."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.quantize_pack import Axis


class Outliers(NamedTuple):
    """Numbers to add to `x[B, K, S, H]` at some places: n of each vector.

    Vectors are the channels of each block of tokens ("channel") or the tokens ("token"). A place that is not
    used has value 0.
    """

    index: jax.Array  # u8 or u16, token in the block [B, K, S / block * n, H], or channel [B, K, n, S]
    value: jax.Array  # the same shape


def count_outliers(fraction: float, length: int) -> int:
    """How many largest, and as many smallest, entries of a vector are outliers: `fraction / 2`, at least one."""
    return max(1, math.floor(fraction * length / 2 + 0.5)) if fraction else 0


def find_outliers(
    x: Float32[Array, "B K S H"], occupied: Bool[Array, "B K S"], count: int, *, axis: Axis, block: int
) -> Int32[Array, "... 2*count"]:
    """The `count` largest and the `count` smallest entries of every vector.

    Args:
      x: f32[B, K, S, H].
      occupied: bool[B, K, S]; empty slots hold no outliers.
      count: of each; ties go to the first. A vector with fewer entries has fewer outliers.
      axis: see `Outliers`.
      block: tokens of a block.

    Returns:
      i32[..., 2 * count] indices in the vectors `_vectors(x)`, -1 for what there is none of.
    """
    vectors = _vectors(x, axis, block)
    valid = _vectors(jnp.broadcast_to(occupied[..., None], x.shape), axis, block)
    count = min(count, vectors.shape[-1])
    largest, high = jax.lax.top_k(jnp.where(valid, vectors, -jnp.inf), count)
    high = jnp.where(largest > -jnp.inf, high, -1)
    free = valid & ~_marks(high, vectors.shape[-1])
    smallest, low = jax.lax.top_k(jnp.where(free, -vectors, -jnp.inf), count)
    return jnp.concatenate([high, jnp.where(smallest > -jnp.inf, low, -1)], axis=-1)


def fill_outliers(x: jax.Array, occupied: jax.Array, index: jax.Array, *, axis: Axis, block: int) -> jax.Array:
    """`x` with the mean of its vector in place of every outlier; arguments as in `find_outliers`."""
    vectors = _vectors(x, axis, block)
    valid = _vectors(jnp.broadcast_to(occupied[..., None], x.shape), axis, block)
    total = jnp.sum(jnp.where(valid, vectors, 0.0), axis=-1, keepdims=True)
    mean = total / jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    return _back(jnp.where(_marks(index, vectors.shape[-1]), mean, vectors), x.shape, axis)


def take_outliers(x: jax.Array, index: jax.Array, *, axis: Axis, block: int, dtype) -> Outliers:
    """What `x` holds at the indices of `find_outliers`, to be stored as `dtype`."""
    vectors = _vectors(x, axis, block)
    there = index >= 0
    value = jnp.where(there, jnp.take_along_axis(vectors, jnp.maximum(index, 0), axis=-1), 0.0)
    small = jnp.uint8 if vectors.shape[-1] <= 256 else jnp.uint16
    return Outliers(_packed(jnp.maximum(index, 0).astype(small), axis), _packed(value.astype(dtype), axis))


def add_outliers(x: jax.Array, outliers: Outliers, *, axis: Axis, block: int) -> jax.Array:
    """`x` with every outlier's value added at its place."""
    B, K, S, H = x.shape
    if not S:  # a body that has no whole block yet
        return x
    if axis == "token":
        index, value = (y[..., None] for y in outliers)  # [B, K, n, S, 1]
        places, over = jnp.arange(H), 2
    else:
        index, value = (y.reshape(B, K, S // block, -1, 1, H) for y in outliers)
        places, over = jnp.arange(block)[:, None], 3
    # Comparing with every place beats a scatter for the few outliers of a vector, and written out XLA makes one loop
    # of it and what x is made of.
    take = lambda y, j: jax.lax.index_in_dim(y, j, axis=over, keepdims=False)
    places = places.astype(index.dtype)
    for j in range(index.shape[over]):
        delta = jnp.where(take(index, j) == places, take(value, j).astype(x.dtype), 0)
        x = x + delta.reshape(x.shape)
    return x


def _vectors(x: jax.Array, axis: Axis, block: int) -> jax.Array:
    """[B, K, S, H] as it is ("token"), or as [B, K, S / block, H, block] ("channel")."""
    if axis == "token":
        return x
    B, K, S, H = x.shape
    return x.reshape(B, K, S // block, block, H).swapaxes(3, 4)


def _back(vectors: jax.Array, shape: tuple[int, ...], axis: Axis) -> jax.Array:
    """The inverse of `_vectors`."""
    return vectors if axis == "token" else vectors.swapaxes(3, 4).reshape(shape)


def _packed(x: jax.Array, axis: Axis) -> jax.Array:
    """Entries of each vector, last, to where `Outliers` has them: channels or slots stay the minor axis."""
    x = jnp.swapaxes(x, -1, -2)
    return x if axis == "token" else x.reshape(*x.shape[:2], -1, x.shape[-1])


def _marks(index: jax.Array, length: int) -> jax.Array:
    """bool[..., length]: which places i32[..., n] names."""
    return jnp.any(index[..., None] == jnp.arange(length), axis=-2)
