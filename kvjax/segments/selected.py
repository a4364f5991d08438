"""A body of which every query reads a few pages: all slots are kept, an index says which of them matter."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int32

from kvjax import sharding
from kvjax.axes import OF_SLOTS, P, heads_alike, slot_axis
from kvjax.rope import Rope, rotate
from kvjax.segments.edits import Edit
from kvjax.segments.hosted import in_host_memory, is_hosted, taken_windows, to_device, to_host
from kvjax.segments.indices import Chosen, Index, bytes_of
from kvjax.segments.protocol import AnySegment, KeyRope, Queries, Ranks
from kvjax.segments.segment import Segment
from kvjax.segments.slots import few_highest, without_rounding
from kvjax.slots import Slots
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial

Source = Literal["own", "whole", "given"]
"""Whose choice a layer reads by: its own; its own, but itself it reads everything; that of an earlier layer."""


class Reading(NamedTuple):
    """How a `SelectedSegment` is read.

    Attributes:
      page: tokens of a page.
      count: pages that a query reads; None: all.
      sinks: the pages of the first so many tokens are always read.
      recent: those of the tokens less than this before the query, too.
      each: calls of at most so many queries choose for each of them; longer ones read everything.
      source: see `Source`.
      hosted: what is stored lies in host memory, and chosen pages are copied from there.
    """

    page: int
    count: int | None
    sinks: int = 0
    recent: int = 0
    each: int = 1
    source: Source = "own"
    hosted: bool = False


@struct.dataclass
class SelectedSegment:
    """Slots in pages, stored in any way that can be cut page by page, with a summary of every page.

    The body of a `BlockedSegment`, whose tail is exact and always read. `choose` scores pages for a query, `attend`
    gathers the chosen ones undecoded and attends to those; without a choice it attends to everything.

    Bytes: those of what is stored and of the summary, and 8 a page and KV head, unless a page is a token or the choice
    is given.
    """

    stored: AnySegment  # S slots
    summary: Any  # of P = S / page pages; None where choices are given
    span: Int32[Array, "B K P 2"] | None  # positions of a page's first and last token, -1 = an empty page
    index: Index
    rope: Rope | None  # rotates keys for the summary that are stored un-rotated
    rows: Int32[Array, " B"] | None  # pages that a query of each row reads; None: `reading.count`
    reading: Reading = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, slots: Segment, index: Index, reading: Reading, *, rope: Rope | None = None, rows: jax.Array | None = None
    ) -> SelectedSegment:
        """Makes one of dense slots in token order, of whole pages."""
        return cls(slots, None, None, index, rope, rows, reading).encode_like(slots)

    def encode_like(self, slots: Segment) -> SelectedSegment:
        """Stores other slots the way these are stored, with their summaries."""
        stored = self.stored.encode_like(slots.with_slots(stats={}))
        B, K, S, H = slots.k.shape
        page = self.reading.page
        span = summary = None
        if self.reading.source != "given":
            pos = slots.pos.reshape(B, K, S // page, page)
            occupied = pos >= 0
            span = _spans(pos) if page > 1 else None
            keys = slots.k if slots.key_rope == "stored" else rotate(slots.k, slots.pos, self.rope)
            in_pages = lambda x: x.reshape(B, K, S // page, page, H)
            summary = self.index.summarise(in_pages(keys), in_pages(slots.k), occupied[..., None])
        return self.replace(stored=stored, summary=summary, span=span)

    def edited(self, edit: Edit) -> SelectedSegment:
        """See `AnySegment.edited`; what is remembered of a page stays that of all that was ever in it."""
        if edit.moves:
            raise ValueError("Pages under an index cannot be moved: it is of rotated keys where they were.")
        stored = self.stored.edited(edit)
        pages = stored.pos.reshape(*stored.pos.shape[:2], -1, self.reading.page)
        return self.replace(stored=stored, span=None if self.span is None else _spans(pages))

    def axes(self) -> SelectedSegment:
        """See `AnySegment.axes`."""
        stored, index = self.stored.axes(), self.index.axes()
        summary = None if self.summary is None else self.index.summary_axes(self.summary)
        rope = jax.tree.map(lambda _: P(), self.rope)
        rows = None if self.rows is None else P("batch")
        span = None if self.span is None else OF_SLOTS
        named = self.replace(stored=stored, summary=summary, span=span, index=index, rope=rope, rows=rows)
        return heads_alike(named, stored)

    def fields(self) -> SelectedSegment:
        """See `Segment.fields`."""
        return jax.tree.map(lambda _: 0, self).replace(stored=self.stored.fields())

    @property
    def pos(self) -> Int32[Array, "B K S"]:
        """i32[B, K, S]."""
        return self.stored.pos

    @property
    def key_rope(self) -> KeyRope:
        """That of what is stored."""
        return self.stored.key_rope

    # --- reading ----------------------------------------------------------------------------------------------------

    selects = True

    @property
    def pages(self) -> int:
        """How many there are."""
        return self._positions.shape[2] // self.reading.page

    @property
    def _positions(self) -> jax.ShapeDtypeStruct:
        """The shape of `pos`, also where this is made of shapes."""
        return jax.eval_shape(lambda stored: stored.pos, self.stored)

    def reads_all(self, queries: int) -> bool:
        """Whether a call of so many queries reads everything."""
        reading = self.reading
        return queries > reading.each or reading.count is None or reading.count >= self.pages

    def choose(self, queries: Queries, *, window: int | None = None, given: Chosen | None = None) -> Chosen:
        """Chooses the pages that each query reads.

        Args:
          queries: of all KV heads.
          window: tokens a query looks back over, itself included: older pages are never chosen.
          given: the choice of an earlier layer.

        Raises:
          ValueError: the layer has no choice of its own, and none is given.
        """
        B, T = queries.pos.shape
        if self.reads_all(T):
            return Chosen()
        if self.reading.source == "given":
            if given is None:
                raise ValueError("given must be the choice of an earlier layer: this layer has no index of its own.")
            return given
        span = _spans(self.pos[..., None]) if self.span is None else self.span
        first, last = span[:, None, ..., 0], span[:, None, ..., 1]  # [B, 1, K, P]
        q_pos = queries.pos[:, :, None, None]
        there = jnp.broadcast_to(first >= 0, (B, T, *first.shape[2:]))
        if window is not None:
            there &= last > q_pos - window
        scores = without_rounding(self.index.score(self.summary, queries, self._keys, there))
        protected = (first < self.reading.sinks) | (last > q_pos - self.reading.recent)
        of_queries = lambda x: jnp.broadcast_to(x, there.shape).reshape(B * T, *there.shape[2:])
        pos = of_queries(jnp.where(there, first, -1))
        rows = None if self.rows is None else jnp.repeat(self.rows, T)
        few = few_highest(of_queries(scores), pos, self.reading.count, of_queries(protected), rows)
        return Chosen(*(x.reshape(B, T, *x.shape[1:]).swapaxes(1, 2) for x in few))

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: Scale | None = None,
        ranks: Ranks | None = None,
        chosen: Chosen | None = None,
    ) -> Partial:
        """See `AnySegment.attend`.

        Args:
          queries: of all its KV heads.
          window: see `AnySegment.attend`.
          scale: the same.
          ranks: the same; refused, positions of what is read by pages are their own.
          chosen: what each query reads, pages of this segment; None, or without pages: everything.
        """
        how = dict(window=window, scale=scale)
        if chosen is None or chosen.pages is None or self.reading.source == "whole":
            return to_device(self.stored).attend(queries, **how)
        pages, valid = chosen

        def one(t):
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)
            ahead = cut(jnp.broadcast_to(queries.ahead, queries.pos.shape))
            query = queries._replace(raw=cut(queries.raw), pos=cut(queries.pos), ahead=ahead)
            of_query = lambda x: jax.lax.dynamic_index_in_dim(x, t, 2, keepdims=False)
            return self.taken(of_query(pages), of_query(valid)).attend(query, **how)

        T = queries.pos.shape[1]
        if T == 1:
            return self.taken(pages[:, :, 0], valid[:, :, 0]).attend(queries, **how)
        each = jax.lax.map(one, jnp.arange(T))
        return jax.tree.map(lambda x: x[:, :, 0].swapaxes(0, 1), each)

    def taken(self, pages: jax.Array, valid: jax.Array) -> AnySegment:
        """Gathers pages i32[B, K, n] of every row and head, as they are stored; empty where bool[B, K, n] is false."""
        segment, count = self.placed().stored, self.pages
        if getattr(segment, "joint", False):  # heads read other pages of coordinates that they share
            segment = segment.replace(joint=False)
        B, K, _ = pages.shape

        def part(x, spec):
            axis = slot_axis(spec)
            if axis < 0:
                return x
            if in_host_memory(x):
                size = x.shape[axis] // count
                return taken_windows(x, pages * size, size, axis)
            x = jnp.moveaxis(x, axis, 2)  # [B, K or 1, E, ...]
            heads, rest = x.shape[1], x.shape[3:]
            rows = jnp.arange(B * heads).reshape(B, heads, 1) * count + pages
            x = x.reshape(B * heads * count, -1)
            x = jnp.take(x, rows.reshape(-1), axis=0, mode="clip")
            return jnp.moveaxis(x.reshape(B, K, -1, *rest), 2, axis)

        taken = jax.tree.map(part, segment, segment.axes())
        return _emptied(taken, jnp.repeat(~valid, self.reading.page, axis=-1))

    def chosen_on_shard(self, chosen: Chosen, axes: tuple[str, ...]) -> Chosen:
        """Returns what a shard holds of a choice among the pages of all shards that slots are split over."""
        if chosen.pages is None or not axes:
            return chosen
        held = self.pages
        pages = chosen.pages - sharding.first_on_shard(axes, held)
        here = chosen.valid & (pages >= 0) & (pages < held)
        if pages.shape[-1] > held:
            here, place = jax.lax.top_k(here.astype(jnp.float32), held)
            pages, here = jnp.take_along_axis(pages, place, axis=-1), here > 0
        return Chosen(jnp.clip(pages, 0, held - 1), here)

    def mass(self, queries: Queries, lse: jax.Array, **how) -> jax.Array:
        """See `AnySegment.mass`; of queries that read everything.

        Raises:
          TypeError: they do not: what they received is not known of pages that nobody read.
        """
        if not self.reads_all(queries.pos.shape[1]):
            raise TypeError("Slots that are read page by page have no attention mass of queries that read only some.")
        return to_device(self.stored).mass(queries, lse, **how)

    def bytes_read(self, queries: int = 1) -> int:
        """Returns the bytes that attention reads for a call: pages as often as they are chosen."""
        stored = bytes_of(self.stored)
        if self.reads_all(queries) or self.reading.source == "whole":
            choosing = self._bytes_of_choice() if not self.reads_all(queries) else 0
            return stored + choosing
        parts = zip(jax.tree.leaves(self.stored), jax.tree.leaves(self.stored.axes()))
        always = sum(bytes_of(x) for x, spec in parts if slot_axis(spec) < 0)
        read = (stored - always) * self.reading.count // self.pages
        if getattr(self.stored, "joint", False):  # every head reads its own pages of what they share
            read *= self._positions.shape[1]
        return always + queries * (read + self._bytes_of_choice())

    def _bytes_of_choice(self) -> int:
        if self.reading.source == "given":
            return 0
        keys = bytes_of(getattr(self.stored, "k", self.stored))
        spans = self._positions if self.span is None else self.span
        return bytes_of(spans) + self.index.bytes_read(self.summary, keys)

    def _keys(self) -> jax.Array:
        slots = self.dense()
        return slots.k if slots.key_rope == "stored" else rotate(slots.k, slots.pos, self.rope)

    # --- rewriting and writing --------------------------------------------------------------------------------------

    def dense(self) -> Segment:
        """See `AnySegment.dense`."""
        return to_device(self.stored).dense()

    def map_dense(self, body, tail) -> SelectedSegment:
        """See `AnySegment.map_dense`; what stores the slots must cut between pages.

        Raises:
          ValueError: blocks of the new codes lie across pages.
        """
        stored = to_device(self.stored).map_dense(body, body)
        pages, block = self.pages, getattr(stored, "block", 1)
        entries = [x.shape[a] % pages for x, a in _slot_axes(stored)]
        if self.reading.page % block or any(entries):
            raise ValueError(
                f"pages of {self.reading.page} tokens must hold whole blocks of the codes, which have {block} tokens: "
                "choose a page that is a multiple of groups and words."
            )
        return self.replace(stored=stored).placed()

    def resize(self, slots: int) -> SelectedSegment:
        """See `Segment.resize`."""
        stored = to_device(self.stored).resize(slots)
        before, after = self.pos.shape[2], stored.pos.shape[2]

        def pad(x, spec):
            axis = slot_axis(spec)
            if axis < 0 or after == before:
                return x
            extra = [(0, 0)] * x.ndim
            extra[axis] = (0, x.shape[axis] * after // before - x.shape[axis])
            return jnp.pad(x, extra)

        named = self.axes()
        summary = None if self.summary is None else jax.tree.map(pad, self.summary, named.summary)
        more = after // self.reading.page - self.pages
        extra = ((0, 0), (0, 0), (0, more), (0, 0))
        span = None if self.span is None else jnp.pad(self.span, extra, constant_values=-1)
        return self.replace(stored=stored, summary=summary, span=span).placed()

    def placed(self) -> SelectedSegment:
        """The same with its slots in the memory that they are kept in."""
        return self.replace(stored=to_host(self.stored)) if self.reading.hosted else self

    def bytes_on_host(self) -> int:
        """Returns the bytes that are kept in host memory."""
        if not self.reading.hosted:
            return 0
        parts = zip(jax.tree.leaves(self.stored), jax.tree.leaves(is_hosted(self.stored)))
        return sum(bytes_of(x) for x, hosted in parts if hosted)


def _spans(pos: jax.Array) -> jax.Array:
    """i32[B, K, P, 2]: the first and the last position of pages i32[B, K, P, page], -1 where one is empty."""
    first = jnp.min(jnp.where(pos >= 0, pos, jnp.iinfo(jnp.int32).max), axis=-1)
    last = jnp.max(pos, axis=-1)
    return jnp.where((last >= 0)[..., None], jnp.stack([first, last], axis=-1), -1)


def _slot_axes(segment: AnySegment) -> list[tuple[jax.Array, int]]:
    parts = zip(jax.tree.leaves(segment), jax.tree.leaves(segment.axes()))
    return [(x, slot_axis(spec)) for x, spec in parts if slot_axis(spec) >= 0]


def _emptied(segment: AnySegment, empty: jax.Array) -> AnySegment:
    """Empties the slots bool[B, K, n] of a segment in any codec."""
    is_slots = lambda x: isinstance(x, Slots)
    drop = lambda x: x.replace(pos=jnp.where(empty, -1, x.pos)) if is_slots(x) else x
    return jax.tree.map(drop, segment, is_leaf=is_slots)
