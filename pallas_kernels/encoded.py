"""What an encoded array is: a pytree that stands for the keys or the values of slots."""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeGuard

import jax
import jax.numpy as jnp


class Encoded(Protocol):
    """A frozen pytree that is logically an array `[B, K, S, H]` and holds all that decoding it takes.

    Whatever has these four is read by the reference of `decode_attention`; kernels have loaders for the types that this
    package defines. What belongs to slots is cut; a table that belongs to all of them stays whole.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, K, S, H)`."""

    @property
    def block(self) -> int:
        """Slots of the smallest piece that can be cut: whole words, and whole groups that share a scale."""

    def cut(self, start: jax.Array | int, size: int) -> Encoded:
        """Returns slots `start .. start + size - 1`.

        Args:
          start: a multiple of `block`; may be traced. i32[B]: every row begins at its own. `cut_slots` takes both.
          size: a multiple of `block`.
        """

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """Returns the numbers, `dtype[B, K, S, H]`. This defines the meaning of the codes."""


def is_encoded(x: Any) -> TypeGuard[Encoded]:
    """Returns whether x is an encoded array, not a `jax.Array`."""
    return hasattr(x, "decode")


def cut_slots(x: jax.Array, start: jax.Array | int, size: int, *, axis: int = 2) -> jax.Array:
    """Returns entries `start .. start + size - 1` along an axis of one leaf.

    Args:
      x: [B, ...].
      start: i32[], or i32[B] where rows begin apart; entries, not slots.
      size: entries.
      axis: along which slots lie; not 0.
    """
    if size == x.shape[axis]:
        return x
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    if x.shape[0] == 1:
        return jax.lax.dynamic_slice_in_dim(x, start[0], size, axis)
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, size, axis - 1))(x, start)


def cut(x: jax.Array | Encoded, start: jax.Array | int, size: int) -> jax.Array | Encoded:
    """Returns slots `start .. start + size - 1` of `[B, K, S, ...]`, encoded or not."""
    return x.cut(start, size) if is_encoded(x) else cut_slots(x, start, size)


def block_of(*arrays: jax.Array | Encoded) -> int:
    """Returns the slots of the smallest piece that can be cut from all of the arrays."""
    return math.lcm(*(x.block for x in arrays if is_encoded(x)))
