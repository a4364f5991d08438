"""One pool of pages for all layers: how many slots a head of a layer has is data, the total is not."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int32

from kvjax.axes import P
from kvjax.rope import Rope
from kvjax.segments.edits import Edit
from kvjax.segments.protocol import AnySegment, KeyRope, Queries
from kvjax.segments.ragged import RaggedSegment
from pallas_kernels.decode_attention import PageRun
from pallas_kernels.partial import Partial


@struct.dataclass
class PooledSegment:
    """The pages of a pool that belong to one layer, a run of them in every row.

    The work follows the layer's pages, not the pool.
    """

    pool: RaggedSegment  # P pages of all layers; owners are KV heads of their layers
    first: Int32[Array, " B"]  # the layer's first page
    count: Int32[Array, " B"]  # how many it has

    def axes(self) -> PooledSegment:
        """See `AnySegment.axes`."""
        return self.replace(pool=self.pool.axes(), first=P("batch"), count=P("batch"))

    def on_shard(self, first: jax.Array) -> PooledSegment:
        """Inside a shard whose first page is `first`: the layer's pages that are there."""
        here = lambda page: jnp.clip(page - first, 0, self.pool.owner.shape[1])
        start = here(self.first)
        return self.replace(first=start, count=here(self.first + self.count) - start)

    @property
    def key_rope(self) -> KeyRope:
        """That of the pages."""
        return self.pool.key_rope

    @property
    def owner(self) -> Int32[Array, "B P"]:
        """i32[B, P], KV head of every page."""
        return self.pool.owner

    @property
    def pos(self) -> jax.Array:
        """That of the pool; the pages of other layers are empty."""
        mine = self.run.has(jnp.arange(self.owner.shape[1]))  # [B, P]
        return jnp.where(self.pool.of_slots(mine), self.pool.pos, -1)

    @property
    def run(self) -> PageRun:
        """The layer's pages."""
        return PageRun(self.first, self.count)

    def attend(self, queries: Queries, **how) -> Partial:
        """See `AnySegment.attend`."""
        return self.pool.attend(queries, run=self.run, **how)

    def mass(self, queries: Queries, lse: jax.Array, **how) -> jax.Array:
        """See `RaggedSegment.mass`; 0 for the pages of other layers."""
        mass, mine = self.pool.mass(queries, lse, **how), self.pos >= 0
        return jnp.where(jnp.repeat(mine, mass.shape[1] // mine.shape[1], axis=1), mass, 0.0)

    def dense(self) -> RaggedSegment:
        """The same with dense pages; those of other layers are empty."""
        dense = self.replace(pool=self.pool.dense())
        return dense.pool.replace(stored=dense.pool.stored.with_slots(pos=dense.pos))

    def edited(self, edit: Edit) -> AnySegment:
        """Refused: see `map_dense`."""
        return self.map_dense(None, None)

    def map_dense(self, body, tail) -> AnySegment:
        """Refused: it is what a layer sees of a pool, which is rewritten where it lies."""
        raise TypeError("PooledSegment is a view: rewrite the pool in Cache.shared.")

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> AnySegment:
        """Refused: see `RaggedSegment.append`."""
        return self.pool.append(k, v, pos, rope)

    def reserve(self, tokens: int) -> AnySegment:
        """Refused: see `RaggedSegment.reserve`."""
        return self.pool.reserve(tokens)


@struct.dataclass
class PoolView:
    """A layer's part of the pool that layers share. Its pages lie together, in every row at another place.

    Bytes: `8 * B`, beside the pool.
    """

    shares_keys: ClassVar[bool] = True

    first: Int32[Array, " B"]  # the layer's first page
    count: Int32[Array, " B"]  # how many it has
    name: str = struct.field(pytree_node=False, default="pool")  # in `Cache.shared`
    of_pool = True  # a part of the pool, which all views together read once

    def inlined(self, shared: dict[str, AnySegment]) -> PooledSegment:
        """See `LayerView.inlined`."""
        return PooledSegment(shared[self.name], self.first, self.count)

    def axes(self) -> PoolView:
        """See `AnySegment.axes`."""
        return self.replace(first=P("batch"), count=P("batch"))

    def edited(self, edit: Edit) -> PoolView:
        """See `LayerView.edited`."""
        return self

    def map_dense(self, body, tail) -> PoolView:
        """Itself: see `LayerView.map_dense`."""
        return self


def pool_layers(paged: RaggedSegment, layers: int) -> tuple[RaggedSegment, list[PoolView]]:
    """Splits pages whose owners are the heads of all layers, those of a layer together.

    Args:
      paged: its owners are `layer * K + head`; as `RaggedSegment.of_list` makes it.
      layers: [L].

    Returns:
      The pool, whose owners are KV heads of their layers, and the view of every layer.
    """
    K = paged.kv_heads // layers
    of_layer = jnp.where(jnp.any(paged.pages.pos >= 0, axis=-1), paged.owner // K, layers)  # [B, P]
    counts = jnp.sum(of_layer[..., None] == jnp.arange(layers), axis=1, dtype=jnp.int32)  # [B, L]
    firsts = jnp.cumsum(counts, axis=-1) - counts
    views = [PoolView(firsts[:, layer], counts[:, layer]) for layer in range(layers)]
    return paged.replace(owner=paged.owner % K, kv_heads=K), views
