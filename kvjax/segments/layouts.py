"""Where new tokens go among the slots of a segment."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from kvjax.segments.slots import CLOSED, LAST


@dataclasses.dataclass(frozen=True)
class Rows:
    """New tokens take the first empty slots; room for them is reserved before."""

    grows = True

    def order(self, pos: jax.Array) -> Int32[Array, "... S"]:
        """i32[..., S]: slots are taken lowest first."""
        return pos


@dataclasses.dataclass(frozen=True)
class Ring:
    """New tokens take empty slots and then those of the oldest tokens, but never those of the first `sinks`."""

    sinks: int = 0
    grows = False

    def is_sink(self, pos: jax.Array) -> Bool[Array, "... S"]:
        """bool[..., S]."""
        return (pos >= 0) & (pos < self.sinks)

    def order(self, pos: jax.Array) -> jax.Array:
        """See `Rows.order`."""
        return jnp.where(self.is_sink(pos) | (pos == CLOSED), LAST, pos)
