"""Slots with keys and values as they are; a ring of them when it overwrites its oldest."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from kvjax import sharding
from kvjax.rope import Rope, re_rotate, rotate
from kvjax.segments.axes import OF_SLOTS, OF_TAIL
from kvjax.segments.protocol import KeyRope, Queries, Ranks, Segment
from kvjax.segments.slots import (
    CLOSED,
    LAST,
    fill_slots,
    fold_slots,
    gather_slots,
    keep_highest,
    token_order,
    write_slots,
)
from pallas_kernels.attention_mass import Reduce, attention_mass
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.lowrank_decode_attention import lowrank_decode_attention
from pallas_kernels.partial import Partial
from pallas_kernels.ragged_decode_attention import PageRun, ragged_decode_attention


@struct.dataclass
class DenseSegment:
    """Keys and values in a floating dtype, one slot a token and KV head.

    New tokens take the first empty slots. With `ring_sinks` set, a full segment overwrites its oldest
    slots, but never tokens `0 .. ring_sinks - 1` (a ring buffer with attention sinks), and never what is in a row of
    the batch closed (`CLOSED`). Without it the caller reserves room first; the drivers check that before anything runs.

    A leading axis of 1 under a larger batch is a prefix shared by all rows: the queries of the whole batch
    attend to it in one product.

    Where `v` is None the keys are the values, stored once: multi-head latent attention. What is appended as a value is
    left out then, and what is read from rotated channels of a value means nothing.

    Bytes: `B * K * S * (2 * H * itemsize + 4 + 4 * len(stats) + (4 if bias))`, or `H` in place of `2 * H`.
    """

    k: jax.Array  # [B, K, S, H]
    v: jax.Array | None  # [B, K, S, H]
    pos: jax.Array  # i32[B, K, S]
    bias: jax.Array | None = None  # f32[B, K, S], log of how many tokens the slot stands for
    stats: dict[str, jax.Array] = struct.field(default_factory=dict)  # each f32[B, K, S]
    key_rope: KeyRope = struct.field(pytree_node=False, default="stored")
    ring_sinks: int | None = struct.field(pytree_node=False, default=None)
    together: bool = struct.field(pytree_node=False, default=False)  # on a mesh, every shard has all slots

    @classmethod
    def empty(
        cls, batch: int, heads: int, slots: int, head_dim: int, dtype, *, own_values: bool = True, **static
    ) -> DenseSegment:
        """`slots` empty slots for every row and KV head; without values of their own, the keys are the values."""
        shape = (batch, heads, slots)
        return cls(
            k=jnp.zeros((*shape, head_dim), dtype),
            v=jnp.zeros((*shape, head_dim), dtype) if own_values else None,
            pos=jnp.full(shape, -1, jnp.int32),
            **static,
        )

    @property
    def values(self) -> jax.Array:
        """[B, K, S, H], as stored."""
        return self.k if self.v is None else self.v

    def values_apart(self, what: str) -> jax.Array:
        """[B, K, S, H], for what cannot work where the keys are the values.

        Raises:
          ValueError: they are; names `what`.
        """
        if self.v is None:
            raise ValueError(
                f"{what} needs values apart from keys, and in multi-head latent attention the keys are the values: "
                "evict, merge or quantize them, or let layers share a basis (share_basis)."
            )
        return self.v

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: float | None = None,
        ranks: Ranks | None = None,
    ) -> Partial:
        """See `Segment.attend`."""
        q = self._queries(queries, ranks)
        q_pos, batch = queries.pos, q.shape[0]
        if self.k.shape[0] == 1 and batch > 1:
            fold = lambda x: x.reshape(1, -1, *x.shape[2:])
            q, q_pos = fold(q), fold(q_pos)
        how = dict(bias=self.bias, window=window, scale=scale)
        if self.key_rope == "stored" or queries.rope is None:
            partial = decode_attention(q, self.k, self.values, q_pos, self.pos, **how)
        else:
            at, inv_freq = None if self.key_rope == "at_attend" else ranks.slots, queries.rope.inv_freq
            partial = lowrank_decode_attention(q, self.k, self.values, None, inv_freq, q_pos, self.pos, at=at, **how)
        return Partial(*(x.reshape(batch, -1, *x.shape[2:]) for x in partial))

    def attend_owned(
        self,
        queries: Queries,
        owner: jax.Array,
        kv_heads: int,
        *,
        run: PageRun | None = None,
        window: int | None = None,
        scale: float | None = None,
    ) -> Partial:
        """Attention of the queries of K heads, where this segment's one head is a row of pages that belong to them.

        Args:
          queries: of K * G heads.
          owner: i32[B, P], the KV head of every page.
          kv_heads: [K].
          run: the pages to attend to. None: all.
          window: see `attend`.
          scale: see `attend`.
        """
        q, k = self._queries(queries, None), self._rotated(queries, None)
        k, v, pos, bias = (None if x is None else x[:, 0] for x in (k, self.values, self.pos, self.bias))
        how = dict(kv_heads=kv_heads, bias=bias, run=run, window=window, scale=scale)
        return ragged_decode_attention(q, k, v, owner, queries.pos, pos, **how)

    def in_a_row(self) -> DenseSegment:
        """[B, P, page, ...] -> [B, 1, P * page, ...]: the heads one after the other, as `attend_owned` takes them."""
        return jax.tree.map(lambda x: x.reshape(x.shape[0], 1, -1, *x.shape[3:]), self)

    def as_pages(self, pages: int) -> DenseSegment:
        """The inverse of `in_a_row`."""
        return jax.tree.map(lambda x: x.reshape(x.shape[0], pages, -1, *x.shape[3:]), self)

    def attend_expanded(
        self,
        queries: Queries,
        columns: jax.Array,
        mean: jax.Array | None,
        *,
        window: int | None = None,
        scale: float | None = None,
    ) -> Partial:
        """Attention where this segment's keys are coordinates of un-rotated keys; values are read as they are.

        Args:
          queries: of K * G heads.
          columns: [1 or B, K, H, R]; keys are `columns k + mean`, rotated at their tokens' positions.
          mean: [K, H] or None.
          window: see `attend`.
          scale: see `attend`.
        """
        q, inv_freq = queries.rotated, queries.rope.inv_freq
        how = dict(mean=mean, bias=self.bias, window=window, scale=scale)
        return lowrank_decode_attention(q, self.k, self.values, columns, inv_freq, queries.pos, self.pos, **how)

    def mass(
        self,
        queries: Queries,
        lse: jax.Array,
        *,
        window: int | None = None,
        scale: float | None = None,
        ranks: Ranks | None = None,
        reduce: Reduce = "sum",
    ) -> jax.Array:
        """See `Segment.mass`."""
        q, k = self._queries(queries, ranks), self._rotated(queries, ranks)
        if self.k.shape[0] != q.shape[0]:
            raise TypeError("A prefix shared by the batch has no per-row attention mass.")
        return attention_mass(
            q, k, queries.pos, self.pos, lse, bias=self.bias, window=window, scale=scale, reduce=reduce
        )

    def dense(self) -> DenseSegment:
        """Itself."""
        return self.replace(together=False)

    def map_dense(self, body, tail) -> Segment:
        """See `Segment.map_dense`."""
        return tail(self)

    def fold_dense(self, attend, *beside) -> Partial:
        """See `Segment.fold_dense`."""
        return fold_slots(self, attend, beside, 1)

    def axes(self) -> DenseSegment:
        """See `Segment.axes`."""
        return jax.tree.map(lambda _: OF_TAIL if self.together else OF_SLOTS, self)

    def no_slots(self) -> DenseSegment:
        """One like this without slots: where tokens that follow may go."""
        B, K, _, H = self.k.shape
        own_values = self.v is not None
        return DenseSegment.empty(B, K, 0, H, self.k.dtype, own_values=own_values, key_rope=self.key_rope)

    def astype(self, dtype) -> DenseSegment:
        """The same with keys and values stored in another floating dtype."""
        return self.map_vectors(lambda x: _store(x, dtype))

    def map_vectors(self, change: Callable[..., jax.Array], *others: DenseSegment) -> DenseSegment:
        """The same with `change(x, *of_others)` in place of its keys and, where it has them, of its values."""
        k, v = jax.tree.map(change, (self.k, self.v), *((other.k, other.v) for other in others))
        return self.replace(k=k, v=v)

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> DenseSegment:
        """See `Segment.append`. A segment without slots becomes the tokens: the start of a prefill."""
        new = self.slots_of(k, v, pos, rope)
        if self.pos.shape[2] == 0:
            return new
        if self.ring_sinks is not None and pos.shape[1] > 1:
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), self, new)
            return both.newest(jnp.sum(self.pos[:, 0] != CLOSED, axis=-1), self.pos.shape[2])
        return self._write(new)

    def newest(self, rows: jax.Array, slots: int) -> DenseSegment:
        """Returns the sinks of a ring and its newest slots, i32[B] `rows` of `slots`; it closes the others."""
        newest_last = jnp.where(self._is_sink(), LAST, self.pos)
        kept = self.take(*keep_highest(newest_last, self.pos, slots, rows))
        open_slots = jnp.arange(slots) < rows[:, None, None]
        return kept.replace(pos=jnp.where(open_slots, kept.pos, CLOSED))

    def slots_of(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> DenseSegment:
        """The tokens as a segment of their own, with this segment's dtype, statistics and rotation."""
        if self.key_rope == "stored":
            k = rotate(k, pos[:, None], rope)
        slot_pos = jnp.broadcast_to(pos[:, None], k.shape[:3])
        fresh = lambda: jnp.zeros(slot_pos.shape, jnp.float32)
        return self.replace(
            k=_store(k, self.k.dtype),
            v=None if self.v is None else _store(v, self.v.dtype),
            pos=slot_pos,
            bias=None if self.bias is None else fresh(),
            stats={name: fresh() for name in self.stats},
        )

    def reserve(self, tokens: int) -> DenseSegment:
        """Adds `tokens` empty slots, and as many more as `sharding.whole` wants; a ring stays as it is."""
        if self.ring_sinks is not None:
            return self
        B, K, S = self.pos.shape
        return self.resize(sharding.whole(S + tokens, batch=B, kv_heads=K, tile=8))

    def resize(self, slots: int) -> DenseSegment:
        """Pads with empty slots up to `slots`."""
        extra = slots - self.pos.shape[2]
        if extra < 0:
            raise ValueError(f"slots must be at least {self.pos.shape[2]}, got {slots}.")
        pad = lambda x, fill=0: jnp.pad(
            x, [(0, 0), (0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 3), constant_values=fill
        )
        return jax.tree.map(pad, self).replace(pos=pad(self.pos, -1))

    def take(self, index: jax.Array, valid: jax.Array) -> DenseSegment:
        """Gathers slots: i32[B, K, n] of them, bool[B, K, n] where the result is occupied."""
        taken = gather_slots(self, index, valid)
        return taken.replace(pos=jnp.where(valid, taken.pos, -1))

    def in_token_order(self, slots: int | None = None) -> DenseSegment:
        """Slots sorted by position, empty ones last; of S or more, as many as `slots` says."""
        more = 0 if slots is None else slots - self.pos.shape[2]
        pos = jnp.pad(self.pos, ((0, 0), (0, 0), (0, more)), constant_values=-1)
        order = token_order(pos)
        return self.take(order, jnp.take_along_axis(pos, order, axis=-1) >= 0)

    def window(self, start: jax.Array, size: int) -> DenseSegment:
        """`size` slots of every row and head from its own i32[B, K] start; those beyond the end are empty."""
        index = start[..., None] + jnp.arange(size)
        there = index < self.pos.shape[2]
        index = jnp.where(there, index, 0)
        return self.take(index, there & (jnp.take_along_axis(self.pos, index, axis=-1) >= 0))

    def split_newest(self, count: int) -> tuple[DenseSegment, DenseSegment]:
        """The older slots and the newest `count` of every row and head, both in token order."""
        S = self.pos.shape[2]
        ordered = self.in_token_order()
        held = jnp.sum(ordered.pos >= 0, axis=-1)
        older = jnp.maximum(held - count, 0)
        newest = ordered.window(older, count)
        rest = jax.tree.map(lambda x: x[:, :, : max(S - count, 0)], ordered)
        return rest.drop(jnp.arange(rest.pos.shape[2]) >= older[..., None]), newest

    def put(self, slot: jax.Array, new: DenseSegment) -> DenseSegment:
        """Writes the one slot of `new` over slot i32[B, K] of every row and head where it is occupied."""
        return write_slots(self, new, slot, new.pos[..., 0] >= 0)

    def drop(self, slots: jax.Array) -> DenseSegment:
        """Empties the slots where bool[B, K, S] is true; their room is used again."""
        return self.replace(pos=jnp.where(slots, -1, self.pos))

    def _queries(self, queries, ranks):
        """[B, T, N, H], rotated as the keys are when they are read."""
        if self.key_rope == "rank" and ranks is None:
            raise TypeError("A segment with key_rope='rank' is read through its layer cache.")
        return ranks.rotated_queries(queries) if self.key_rope == "rank" else queries.rotated

    def _rotated(self, queries, ranks):
        """[B, K, S, H] keys, all of them: of few slots, or where nobody waits."""
        if self.key_rope == "stored":
            return self.k
        return rotate(self.k, self.pos if self.key_rope == "at_attend" else ranks.slots, queries.rope)

    def oldest(self) -> DenseSegment:
        """The one slot of every row and head that the next token takes: an empty one, or the oldest but for sinks."""
        slot = self._next_slot()[..., None]
        return self.take(slot, jnp.take_along_axis(self.pos, slot, axis=-1) >= 0)

    def _is_sink(self):
        sinks = self.ring_sinks or 0
        return (self.pos >= 0) & (self.pos < sinks)

    def _order(self):
        """i32[B, K, S]: slots are taken lowest first."""
        return jnp.where(self._is_sink() | (self.pos == CLOSED), LAST, self.pos)

    def _next_slot(self):
        return jnp.argmin(self._order(), axis=-1)

    def _write(self, new: DenseSegment) -> DenseSegment:
        """Puts the occupied slots of `new` into the first empty (in a full ring: the oldest) slots."""
        return self.put(self._next_slot(), new) if new.pos.shape[2] == 1 else fill_slots(self, new)


def unrotated(slots: DenseSegment, rope: Rope) -> DenseSegment:
    """The same slots with keys as they were before their rotation, to be rotated when read."""
    if slots.key_rope != "stored":
        return slots
    return slots.replace(k=re_rotate(slots.k, -slots.pos, rope), key_rope="at_attend")


def _store(x: jax.Array, dtype) -> jax.Array:
    """Casts for storage; 8-bit floats have no infinity, so what lies beyond their range is clipped."""
    if jnp.dtype(dtype).itemsize == 1:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def dense_tail(layer, transform: str) -> DenseSegment:
    """The layer cache's last segment, if it is one whose slots can be gathered and dropped.

    Raises:
      ValueError: it is compressed; says which transform wanted it and what it found.
    """
    segment = layer.segments[-1]
    if not isinstance(segment, DenseSegment):
        raise ValueError(
            f"{transform} needs dense slots to choose from, got a {type(segment).__name__}: put {transform} "
            "before the transform that made it."
        )
    return segment
