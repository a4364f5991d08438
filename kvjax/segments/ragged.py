"""Pages that belong to KV heads: how many slots a head has is data, the total is not."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int32

from kvjax import sharding
from kvjax.axes import P, rename
from kvjax.rope import Rope
from kvjax.segments.edits import Edit
from kvjax.segments.protocol import AnySegment, KeyRope, Queries
from kvjax.segments.segment import Segment, dense_tail
from kvjax.segments.slots import counts_by_owner
from pallas_kernels.decode_attention import PageRun, Pages
from pallas_kernels.partial import Partial, spread_to_owned


class SlotList(NamedTuple):
    """Slots of several heads in one list."""

    slots: Segment  # [B, 1, M, ...]
    owner: Int32[Array, "B M"]  # their heads

    @classmethod
    def of(cls, segment: Segment, first: jax.Array | int = 0) -> SlotList:
        """Those of a segment whose heads are `first`, `first + 1`, ..."""
        B, K, S = segment.pos.shape
        flat = jax.tree.map(lambda x: x.reshape(B, 1, K * S, *x.shape[3:]), segment)
        return cls(flat, jnp.broadcast_to(first + jnp.arange(K)[:, None], (B, K, S)).reshape(B, -1))

    def plus(self, other: SlotList) -> SlotList:
        """Those of both."""
        join = lambda *x: jnp.concatenate(x, axis=2)
        return SlotList(
            jax.tree.map(join, self.slots, other.slots), jnp.concatenate([self.owner, other.owner], axis=1)
        )

    def of_head(self, head: jax.Array) -> Segment:
        """A segment of one head: the same keys and values, and all slots of other heads empty."""
        return self.slots.drop((self.owner != head)[:, None])


@struct.dataclass
class RaggedSegment:
    """A pool of P pages a row; each page holds slots of one KV head, in any codec.

    Pages lie one after the other, as one head of P * page slots that kernels read with their owners: a TPU would pad
    what has [P, page] numbers to tiles, and lay it out anew at every step. The work is that of the pages, however
    unequal the heads are. Unused pages are empty, and head 0's.

    Bytes: those of the slots, and `4 * B * P`.
    """

    stored: Segment  # [B, 1, P * page, ...]
    owner: Int32[Array, "B P"]  # KV head of every page
    kv_heads: int = struct.field(pytree_node=False)

    @classmethod
    def of_list(
        cls, held: SlotList, keep: Bool[Array, "B M"], *, kv_heads: int, page: int, pages: int
    ) -> RaggedSegment:
        """Gathers the kept ones of M slots into pages, those of a head together, in token order.

        Args:
          held: slots of all heads.
          keep: bool[B, M]; with `c` kept slots of a head, `sum(ceil(c / page)) <= pages` must hold.
          kv_heads: [K].
          page: slots of a page.
          pages: [P]; on a mesh as many more as make its shards equal.
        """
        slots, owner = held
        if slots.key_rope in ("rank", "window"):
            raise TypeError("RaggedSegment does not re-index positions.")
        B, M = owner.shape
        K, pages = kv_heads, sharding.whole_pages(pages, batch=B)
        pos = slots.pos[:, 0]
        order = jnp.lexsort((pos, jnp.where(keep, owner, K)), axis=-1)  # by head, then token; the rest last
        count = counts_by_owner(keep, owner, K)
        used = -(-count // page)
        last_page = jnp.cumsum(used, axis=-1)
        first_page, first_slot = last_page - used, jnp.cumsum(count, axis=-1) - count
        p = jnp.arange(pages)
        of_page = jnp.sum(p[None, :, None] >= last_page[:, None], axis=-1)  # [B, P], K beyond the last
        there = of_page < K
        of_page = jnp.where(there, of_page, 0)
        per_head = lambda x: jnp.take_along_axis(x, of_page, axis=1)
        rank = (p - per_head(first_page))[..., None] * page + jnp.arange(page)  # [B, P, page]
        valid = there[..., None] & (rank < per_head(count)[..., None])
        index = jnp.clip(per_head(first_slot)[..., None] + rank, 0, M - 1).reshape(B, -1)
        index = jnp.take_along_axis(order, index, axis=1)
        taken = slots.take(index[:, None], valid.reshape(B, 1, -1))
        return cls(taken, of_page.astype(jnp.int32), kv_heads)

    @property
    def pages(self) -> Segment:
        """[B, P, page, ...], as a segment whose heads are the pages."""
        return self.stored.as_pages(self.owner.shape[1])

    def with_pages(self, pages: Segment) -> RaggedSegment:
        """Puts other pages [B, P, page, ...] in place, of the same owners."""
        return self.replace(stored=pages.flattened())

    def of_slots(self, of_pages: jax.Array) -> jax.Array:
        """What is known of pages, [B, P], for each of their slots: shaped as `pos`."""
        page = self.pos.size // self.owner.size
        return jnp.repeat(of_pages, page, axis=1).reshape(self.pos.shape)

    def axes(self) -> RaggedSegment:
        """See `AnySegment.axes`: a page is whole, and pages lie anywhere."""
        named = rename(self.stored.axes(), {"kv_heads": None, "slots": "pages"})
        return self.replace(stored=named, owner=P("batch", "pages"))

    @property
    def key_rope(self) -> KeyRope:
        """That of the pages."""
        return self.stored.key_rope

    @property
    def pos(self) -> Int32[Array, "B 1 P*page"]:
        """i32[B, 1, P * page]."""
        return self.stored.pos

    def attend(self, queries: Queries, *, run: PageRun | None = None, **how) -> Partial:
        """See `AnySegment.attend`; of a run of pages, or of all."""
        return self.stored.attend(queries, pages=Pages(self.owner, self.kv_heads, run), **how)

    def mass(self, queries: Queries, lse: jax.Array, **how) -> jax.Array:
        """See `AnySegment.mass`; by the G query heads of a page's owner: f32[B, G, P * page]."""
        spread = lambda x: spread_to_owned(x, self.owner, self.kv_heads)
        mass = self.pages.mass(queries._replace(raw=spread(queries.raw)), spread(lse), **how)
        (B, P), page = self.owner.shape, mass.shape[-1]
        return jnp.swapaxes(mass.reshape(B, P, -1, page), 1, 2).reshape(B, -1, P * page)

    def as_list(self) -> SlotList:
        """The slots of its dense pages; unused ones are empty."""
        return SlotList(self.stored, self.of_slots(self.owner)[:, 0])

    def dense(self) -> RaggedSegment:
        """The same with dense pages."""
        return self.with_pages(self.pages.dense())

    def map_dense(self, body, tail) -> RaggedSegment:
        """See `AnySegment.map_dense`."""
        return self.with_pages(self.pages.map_dense(body, body))

    def edited(self, edit: Edit) -> RaggedSegment:
        """See `AnySegment.edited`."""
        return self.replace(stored=self.stored.edited(edit))

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> RaggedSegment:
        """Refused: new tokens go to the segment behind it."""
        raise TypeError("RaggedSegment is written once; new tokens go to the dense segment behind it.")

    def reserve(self, tokens: int) -> RaggedSegment:
        """Refused: see `append`."""
        raise TypeError("RaggedSegment is written once; reserve in the dense segment behind it.")


def split_pages(layer, transform: str) -> tuple[tuple[AnySegment, ...], RaggedSegment | None, Segment]:
    """The layer cache's segments: those before, pages if they come right before the tail, and the dense tail.

    Raises:
      ValueError: the tail is compressed, see `dense_tail`.
    """
    tail = dense_tail(layer, transform)
    before = layer.segments[:-1]
    if before and isinstance(before[-1], RaggedSegment):
        return before[:-1], before[-1], tail
    return before, None, tail
