"""Segments whose slots several layers share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.rope import Rope
from kvjax.segments.axes import OF_SLOTS, heads_alike, rename
from kvjax.segments.dense import DenseSegment
from kvjax.segments.protocol import KeyRope, Queries, Segment
from pallas_kernels.partial import Partial


@struct.dataclass
class SharedView:
    """A segment without its slots, which are in `Cache.shared`: a `LayerView`.

    Bytes: those of what the layer has of its own.
    """

    segment: Segment  # its `field` is None
    field: str = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)  # in `Cache.shared`

    def inlined(self, shared: dict[str, Segment]) -> Segment:
        """See `LayerView.inlined`."""
        return self.segment.replace(**{self.field: shared[self.name]})

    def axes(self) -> SharedView:
        """See `Segment.axes`."""
        return self.replace(segment=self.segment.axes())

    def map_dense(self, body, tail) -> SharedView:
        """See `LayerView.map_dense`."""
        return self


@struct.dataclass
class ScaledSegment:
    """Slots of any representation, times a number for each key and each value.

    `k = key_scale * direction.k`, `v = value_scale * direction.v`. Several layers may read the same directions at
    scales of their own. Products exist for one tile at a time.

    Bytes: those of the directions, and `8 * B * K * S`.
    """

    direction: Segment  # rotated keys
    key_scale: jax.Array  # f32[B, K, S], or of fewer slots: a packed direction may have more, which are empty
    value_scale: jax.Array  # the same

    def axes(self) -> ScaledSegment:
        """See `Segment.axes`."""
        named = self.replace(key_scale=OF_SLOTS, value_scale=OF_SLOTS)
        if self.direction is None:
            return named
        direction = self.direction.axes()
        named = heads_alike(named.replace(direction=direction), direction)
        alike = self.direction.pos.shape[2] == self.key_scale.shape[2]  # or scales would lie beside other slots
        return named if alike else rename(named, {"slots": None})

    @property
    def key_rope(self) -> KeyRope:
        """That of the directions."""
        return self.direction.key_rope

    @property
    def pos(self) -> jax.Array:
        """i32[B, K, S]."""
        return self.direction.pos

    def attend(self, queries: Queries, **how) -> Partial:
        """See `Segment.attend`."""

        def tile(slots, key_scale, value_scale):
            scaled = _scaled(slots, key_scale, value_scale)
            return scaled.astype(queries.raw.dtype).attend(queries, **how)

        return self.direction.fold_dense(tile, *self._scales())

    def mass(self, queries: Queries, lse: jax.Array, **how) -> jax.Array:
        """See `Segment.mass`."""
        return self.dense().mass(queries, lse, **how)

    def dense(self) -> DenseSegment:
        """Keys and values of the layer, float32."""
        return _scaled(self.direction.dense(), *self._scales())

    def map_dense(self, body, tail) -> ScaledSegment:
        """See `Segment.map_dense`: the directions; scales stay."""
        return self.replace(direction=self.direction.map_dense(body, body))

    def fold_dense(self, attend, *beside) -> Partial:
        """See `Segment.fold_dense`."""
        tile = lambda slots, ks, vs, *rest: attend(_scaled(slots, ks, vs), *rest)
        return self.direction.fold_dense(tile, *self._scales(), *beside)

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> ScaledSegment:
        """Refused: other layers read the same directions."""
        raise TypeError("ScaledSegment is written once; new tokens go to the dense segment behind it.")

    def reserve(self, tokens: int) -> ScaledSegment:
        """Refused: see `append`."""
        raise TypeError("ScaledSegment is written once; reserve in the dense segment behind it.")

    def _scales(self) -> tuple[jax.Array, jax.Array]:
        """Both scales, one for each slot of the directions."""
        extra = self.direction.pos.shape[2] - self.key_scale.shape[2]
        return tuple(jnp.pad(x, ((0, 0), (0, 0), (0, extra))) for x in (self.key_scale, self.value_scale))


def _scaled(slots: DenseSegment, key_scale: jax.Array, value_scale: jax.Array) -> DenseSegment:
    times = lambda x, scale: x.astype(jnp.float32) * scale[..., None]
    return slots.replace(k=times(slots.k, key_scale), v=times(slots.v, value_scale))
