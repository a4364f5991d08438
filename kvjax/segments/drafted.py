"""Tokens that were read behind a cache and are not in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int32

from kvjax.rope import Rope
from kvjax.segments.protocol import KeyRope


@struct.dataclass
class DraftedTokens:
    """Takes the tokens of one call as a decoder computed them, in place of the segments before it, which stay.

    It has no slots while the decoder attends. Afterwards it holds what `LayerCache.append` needs to write any number of
    the tokens: keys before their rotation and values in the decoder's dtype, positions, and the rotation.
    """

    k: Float[Array, "B K T H"] | None  # un-rotated; None: nothing was read yet
    v: Float[Array, "B K T H"] | None
    token_pos: Int32[Array, "B T"]  # -1 is padding
    rope: Rope | None
    key_rope: KeyRope = struct.field(pytree_node=False, default="at_attend")

    @classmethod
    def empty(cls, batch: int) -> DraftedTokens:
        """Makes one that has taken nothing."""
        return cls(None, None, jnp.zeros((batch, 0), jnp.int32), None)

    @property
    def pos(self) -> Int32[Array, "B 1 T"]:
        """i32[B, 1, T]: the same in every head."""
        return self.token_pos[:, None]

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> DraftedTokens:
        """Keeps the tokens as they come."""
        return self.replace(k=k, v=v, token_pos=pos, rope=rope)

    def padded(self, tokens: int) -> DraftedTokens:
        """Adds padding up to so many tokens."""
        more = tokens - self.token_pos.shape[1]
        pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
        pos = jnp.pad(self.token_pos, ((0, 0), (0, more)), constant_values=-1)
        return self.replace(k=pad(self.k), v=pad(self.v), token_pos=pos)
