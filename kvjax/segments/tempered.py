"""Slots of contexts that were read apart from each other, attended to at a temperature of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int32

from kvjax import sharding
from kvjax.rope import Rope
from kvjax.segments.edits import Edit
from kvjax.segments.protocol import AnySegment, KeyRope, Queries
from pallas_kernels.logits import Scale, SoftCap
from pallas_kernels.partial import Partial, combine


@struct.dataclass
class TemperedSegment:
    """Segments whose attention is one part of a layer's, sharper and of less or more weight than it would be.

    With logits `x_s` of a query: `out = softmax(x / temperature) v` over the slots of all of them, and
    `lse = factor * temperature * logsumexp(x / temperature)` in the merge with what else the layer holds.

    Bytes: those of the segments.
    """

    segments: tuple[AnySegment, ...]
    temperature: float = struct.field(pytree_node=False)
    factor: float = struct.field(pytree_node=False)

    def axes(self) -> TemperedSegment:
        """See `AnySegment.axes`."""
        return self.replace(segments=tuple(segment.axes() for segment in self.segments))

    @property
    def key_rope(self) -> KeyRope:
        """That of the segments."""
        return self.segments[0].key_rope

    @property
    def pos(self) -> Int32[Array, "B K S"]:
        """i32[B, K, S] of all slots."""
        return jnp.concatenate([segment.pos for segment in self.segments], axis=-1)

    def attend(self, queries: Queries, *, scale: Scale | None = None, **how) -> Partial:
        """See `AnySegment.attend`."""
        if isinstance(scale, SoftCap):
            raise TypeError("Where logits are capped there is no temperature of a part of them.")
        scale = (queries.raw.shape[-1] ** -0.5 if scale is None else scale) / self.temperature
        own = combine([sharding.attend(s, queries, scale=scale, **how) for s in self.segments if s.pos.shape[-1]])
        weight = self.factor * self.temperature
        return own._replace(lse=jnp.where(own.lse == -jnp.inf, own.lse, weight * own.lse))

    def mass(self, queries: Queries, lse: jax.Array, **how) -> jax.Array:
        """Refused: contexts are not scored."""
        raise TypeError("TemperedSegment has no received attention: its part of a layer has a temperature of its own.")

    def dense(self) -> TemperedSegment:
        """The same with dense slots."""
        return self.replace(segments=tuple(segment.dense() for segment in self.segments))

    def map_dense(self, body, tail) -> TemperedSegment:
        """See `AnySegment.map_dense`."""
        return self.replace(segments=tuple(segment.map_dense(body, body) for segment in self.segments))

    def edited(self, edit: Edit) -> TemperedSegment:
        """See `AnySegment.edited`."""
        return self.replace(segments=tuple(segment.edited(edit) for segment in self.segments))

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> TemperedSegment:
        """Refused: new tokens go to the segment behind it."""
        raise TypeError("TemperedSegment is written once; new tokens go to the segment behind it.")

    def reserve(self, tokens: int) -> TemperedSegment:
        """Refused: see `append`."""
        raise TypeError("TemperedSegment is written once; reserve in the segment behind it.")
