"""Segments whose slots several layers share."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float32

from kvjax.axes import OF_SLOTS
from kvjax.codecs import Scaled
from kvjax.segments.edits import Edit
from kvjax.segments.protocol import AnySegment
from kvjax.segments.segment import Segment


@struct.dataclass
class SharedView:
    """A segment without its slots, which are in `Cache.shared`: a `LayerView`.

    Bytes: those of what the layer has of its own.
    """

    shares_keys: ClassVar[bool] = False

    segment: AnySegment  # its `field` is None
    field: str = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)  # in `Cache.shared`

    def inlined(self, shared: dict[str, AnySegment]) -> AnySegment:
        """See `LayerView.inlined`."""
        return self.segment.replace(**{self.field: shared[self.name]})

    def axes(self) -> SharedView:
        """See `AnySegment.axes`."""
        return self.replace(segment=self.segment.axes())

    def edited(self, edit: Edit) -> SharedView:
        """See `LayerView.edited`."""
        return self

    def map_dense(self, body, tail) -> SharedView:
        """See `LayerView.map_dense`."""
        return self


@struct.dataclass
class SlotsView:
    """Slots of another layer, which are in `Cache.shared`, as they are: a `LayerView`.

    Bytes: none.
    """

    name: str = struct.field(pytree_node=False)  # in `Cache.shared`

    def inlined(self, shared: dict[str, AnySegment]) -> AnySegment:
        """See `LayerView.inlined`."""
        return shared[self.name]

    def axes(self) -> SlotsView:
        """See `AnySegment.axes`."""
        return self

    def map_dense(self, body, tail) -> SlotsView:
        """See `LayerView.map_dense`."""
        return self


@struct.dataclass
class ScaledView:
    """A layer's lengths of keys and values whose directions several layers share in `Cache.shared`: a `LayerView`.

    `k = key_length * direction.k`, `v = value_length * direction.v`.

    Bytes: `8 * B * K * S`, beside the directions.
    """

    shares_keys: ClassVar[bool] = True

    key_length: Float32[Array, "B K S"]  # or of fewer slots: packed directions may have more, which are empty
    value_length: jax.Array  # the same
    name: str = struct.field(pytree_node=False)  # in `Cache.shared`

    def inlined(self, shared: dict[str, AnySegment]) -> Segment:
        """See `LayerView.inlined`."""
        directions = shared[self.name]
        extra = directions.pos.shape[2] - self.key_length.shape[2]
        of_slots = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra)))
        k = Scaled(directions.k, of_slots(self.key_length))
        return directions.replace(k=k, v=Scaled(directions.v, of_slots(self.value_length)))

    def axes(self) -> ScaledView:
        """See `AnySegment.axes`."""
        return self.replace(key_length=OF_SLOTS, value_length=OF_SLOTS)

    def edited(self, edit: Edit) -> ScaledView:
        """See `LayerView.edited`."""
        return self

    def map_dense(self, body, tail) -> ScaledView:
        """See `LayerView.map_dense`."""
        return self
