"""An array of keys or values that may be stored as codes, and what everything else asks of it."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.axes import OF_SLOTS
from pallas_kernels import encoded


class Encoded(encoded.Encoded, Protocol):
    """An encoded array of `pallas_kernels`, with what writing, moving and sharding its slots takes.

    One without slots (its arrays are None) is the codec itself: `like` makes one with slots of it.
    """

    by_slot: bool
    """Whether slots are written, gathered and emptied one by one; if not, in blocks that share numbers."""

    def for_slots(self, slots: int, block: int | None = None) -> Encoded:
        """Returns the codec that suits a number of slots that are written once, or in blocks; mostly itself."""

    def like(self, x: Float[Array, "B K n H"], occupied: Bool[Array, "B K n"]) -> Encoded:
        """Encodes other slots with the same codec.

        Args:
          x: [B, K, n, H]; n is a multiple of `block`.
          occupied: bool[B, K, n]; what empty slots hold does not matter and changes no other slot.
        """

    def axes(self) -> Encoded:
        """Returns the tree with a `PartitionSpec` of names in place of every array: see `AnySegment.axes`."""

    def fields(self) -> Encoded:
        """Returns the tree with, in place of every array, the bits of a slot in its words; 0 where it is no word."""

    def leaf_and_gain(self) -> tuple[jax.Array | encoded.Encoded, jax.Array | None]:
        """Returns `(leaf, gain)` with `decode()_s = gain_s leaf_s`, f32[B, K, S]: what attention reads."""


Stored = jax.Array | Encoded
"""Keys or values, as numbers of a floating dtype or encoded."""


def is_array(x: Stored) -> bool:
    """Tells stored numbers from codes."""
    return not encoded.is_encoded(x)


def decode(x: Stored, dtype: Any = None) -> jax.Array:
    """Returns [B, K, S, H] in `dtype`; without one in the dtype it is stored in, codes in float32."""
    if is_array(x):
        return x if dtype is None else x.astype(dtype)
    return x.decode() if dtype is None else x.decode(dtype)


def encode_like(codec: Stored, x: jax.Array, occupied: jax.Array) -> Stored:
    """Stores x [B, K, n, H] as `codec` is stored; codes with as many empty slots as fill their blocks."""
    if is_array(codec):
        return store(x, codec.dtype)
    extra = ((0, 0), (0, 0), (0, -x.shape[2] % codec.block))
    return codec.like(jnp.pad(x, (*extra, (0, 0))), jnp.pad(occupied, extra))


def block_of(x: Stored) -> int:
    """Returns `Encoded.block`, of which a number of slots is a multiple; 1 for arrays."""
    return encoded.block_of(x)


def by_slot(x: Stored) -> bool:
    """Returns `Encoded.by_slot`; True for arrays."""
    return is_array(x) or x.by_slot


def named_axes(x: Stored) -> Any:
    """Returns `Encoded.axes`; [B, K, S, H] for arrays."""
    return OF_SLOTS if is_array(x) else x.axes()


def fields_of(x: Stored) -> Any:
    """Returns `Encoded.fields`; 0 for arrays."""
    return 0 if is_array(x) else x.fields()


def leaf_and_gain(x: Stored | None) -> tuple[Stored | None, jax.Array | None]:
    """Returns `Encoded.leaf_and_gain`; an array is its own leaf."""
    return (x, None) if is_array(x) else x.leaf_and_gain()


def store(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts for storage; 8-bit floats have no infinity, so what lies beyond their range is clipped."""
    if jnp.dtype(dtype).itemsize == 1:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)
