"""Weights as 8-bit integers: half or a quarter of the bytes, multiplied in the dtype of what they meet."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Int8Matrix:
    """A matrix `codes * scale`, with a scale for each output. Bytes: `in * out + 4 * out`."""

    codes: jax.Array  # i8[..., in, out]
    scale: jax.Array  # f32[..., out], the largest |entry| of an output / 127

    @classmethod
    def of(cls, matrix: np.ndarray) -> Int8Matrix:
        """Rounds [..., in, out] to the nearest code; off by at most half a scale."""
        return cls(*map(jnp.asarray, quantized(matrix)))

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes


def quantized(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(codes i8[..., in, out], scale f32[..., out])` of a matrix, see `Int8Matrix`."""
    largest = np.max(np.abs(matrix), axis=-2).astype(np.float32)
    scale = np.where(largest > 0, largest, 1.0).astype(np.float32) / np.float32(127)
    return np.rint(matrix.astype(np.float32) / scale[..., None, :]).astype(np.int8), scale


Weight = jax.Array | Int8Matrix


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x @ weight`, [..., n, in] -> [..., n, out], in x's dtype."""
    if isinstance(weight, Int8Matrix):
        return (x @ weight.codes.astype(x.dtype)) * weight.scale[..., None, :].astype(x.dtype)
    return x @ weight


def grouped_matmul(rows: jax.Array, weight: Weight, group: jax.Array, count: jax.Array) -> jax.Array:
    """`rows[i] @ weight[group[i]]`, for rows in the order of their groups.

    Args:
      rows: [n, in].
      weight: [E, in, out].
      group: i32[n], ascending.
      count: i32[E], rows of each group.
    """
    if isinstance(weight, Int8Matrix):
        product = jax.lax.ragged_dot(rows, weight.codes.astype(rows.dtype), count)
        return product * jnp.take(weight.scale, group, axis=0).astype(rows.dtype)
    return jax.lax.ragged_dot(rows, weight, count)


def dense(weight: Weight) -> jax.Array:
    """The matrix as numbers, for what looks at weights instead of multiplying with them."""
    if isinstance(weight, Int8Matrix):
        return weight.codes * weight.scale[..., None, :]
    return weight
