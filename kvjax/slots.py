"""What is known of slots beside their keys and values: a type, so that positions are told apart from other numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32


@struct.dataclass
class Slots:
    """Positions of S slots of every row and KV head, with what else belongs to each; moved with keys and values.

    Bytes: `B * K * S * (4 + 4 * len(stats) + (4 if bias))`.
    """

    pos: Int32[Array, "B K S"]  # token position, -1 = empty (any number below 0)
    bias: Float32[Array, "B K S"] | None = None  # log of how many tokens the slot stands for
    stats: dict[str, jax.Array] = struct.field(default_factory=dict)  # each f32[B, K, S]

    @property
    def occupied(self) -> Bool[Array, "B K S"]:
        """bool[B, K, S]."""
        return self.pos >= 0

    def fresh(self, pos: jax.Array) -> Slots:
        """Slots at other positions i32[B, K, n], with the same statistics, all zero."""
        zero = lambda x: jnp.zeros(pos.shape, x.dtype)
        return Slots(pos, *jax.tree.map(zero, (self.bias, self.stats)))

    def resized(self, slots: int, empty: int = -1) -> Slots:
        """Adds empty slots at the end up to `slots`, at position `empty`."""
        pad = lambda x, fill: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2])), constant_values=fill)
        return Slots(pad(self.pos, empty), *jax.tree.map(lambda x: pad(x, 0), (self.bias, self.stats)))
