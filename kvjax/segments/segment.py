"""Slots: keys and values, each in a code of its own, with their positions and where new tokens go."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float32, Int32

from kvjax import codecs, sharding
from kvjax.axes import OF_SLOTS, replicated_slots, slot_axis
from kvjax.codecs import Stored
from kvjax.rope import Rope, re_rotate, rotate
from kvjax.segments.edits import Edit
from kvjax.segments.layouts import Ring, Rows
from kvjax.segments.moves import fill_slots, gather_slots, joined, resized, write_slots
from kvjax.segments.protocol import KeyBasis, KeyRope, Queries, Ranks
from kvjax.segments.slots import CLOSED, LAST, keep_highest, token_order
from kvjax.slots import Slots
from pallas_kernels.attention_mass import Reduce, attention_mass
from pallas_kernels.decode_attention import Pages, Rotation, decode_attention
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial, combine


@struct.dataclass
class Segment:
    """S slots of every row and KV head; the only segment that stores keys and values.

    Keys and values are arrays or codes, each as it likes. Slots of codes with `by_slot` are written, gathered and
    emptied one by one, without being decoded; others are written once, or block by block behind an exact tail
    (`BlockedSegment`). Bytes: those of keys, values and slots.

    A leading axis of b under a batch of B, a multiple of it, is shared: each row by the B / b rows of the batch in its
    place, whose queries attend to it in one product (`kvjax.sharding.attend`). Where `v` is None the keys are the
    values, stored once: multi-head latent attention.
    """

    k: Stored  # [B, K, S, H]
    v: Stored | None  # [B, K, S, H]
    slots: Slots
    key_rope: KeyRope = struct.field(pytree_node=False, default="stored")
    layout: Rows | Ring = struct.field(pytree_node=False, default=Rows())
    replicated: bool = struct.field(pytree_node=False, default=False)  # on a mesh, every shard has all slots
    outside_windows: bool = struct.field(pytree_node=False, default=False)  # every query sees them, however far back

    @classmethod
    def of(cls, k: Stored, v: Stored | None, pos: jax.Array, *, bias=None, stats=None, **static) -> Segment:
        """Makes one of keys, values and positions i32[B, K, S]; see `Slots` for the rest."""
        return cls(k, v, Slots(pos, bias, stats or {}), **static)

    @classmethod
    def empty(
        cls, batch: int, heads: int, slots: int, head_dim: int, dtype, *, own_values: bool = True, **static
    ) -> Segment:
        """Makes `slots` empty slots for every row and KV head; without values of their own, the keys are the values."""
        shape = (batch, heads, slots)
        zeros = lambda: jnp.zeros((*shape, head_dim), dtype)
        return cls.of(zeros(), zeros() if own_values else None, jnp.full(shape, -1, jnp.int32), **static)

    @property
    def pos(self) -> Int32[Array, "B K S"]:
        """i32[B, K, S], token position of every slot, -1 = empty."""
        return self.slots.pos

    @property
    def bias(self) -> Float32[Array, "B K S"] | None:
        """f32[B, K, S], see `Slots`."""
        return self.slots.bias

    @property
    def stats(self) -> dict[str, jax.Array]:
        """f32[B, K, S] each, see `Slots`."""
        return self.slots.stats

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are arrays, which may be rewritten."""
        return codecs.is_array(self.k) and (self.v is None or codecs.is_array(self.v))

    @property
    def by_slot(self) -> bool:
        """Whether slots are written, gathered and emptied one by one."""
        return all(map(codecs.by_slot, self._stored()))

    @property
    def block(self) -> int:
        """Slots that can be cut off together, of which S is a multiple."""
        return math.lcm(*map(codecs.block_of, self._stored()))

    @property
    def values(self) -> Stored:
        """[B, K, S, H], as stored."""
        return self.k if self.v is None else self.v

    def values_apart(self, what: str) -> Stored:
        """Returns `v`, for what cannot work where the keys are the values.

        Raises:
          ValueError: they are; names `what`.
        """
        if self.v is None:
            raise ValueError(
                f"{what} needs values apart from keys, and in multi-head latent attention the keys are the values: "
                "evict, merge or quantize them, or let layers share a basis (share_basis)."
            )
        return self.v

    def with_slots(self, **changes) -> Segment:
        """Replaces some of `pos`, `bias` and `stats`."""
        return self.replace(slots=self.slots.replace(**changes))

    # --- reading ----------------------------------------------------------------------------------------------------

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: Scale | None = None,
        ranks: Ranks | None = None,
        key_basis: KeyBasis | None = None,
        pages: Pages | None = None,
    ) -> Partial:
        """See `AnySegment.attend`; codes are read as codes.

        Args:
          queries: of K * G heads.
          window: see `AnySegment.attend`.
          scale: the same.
          ranks: the same.
          key_basis: in which the keys are coordinates of un-rotated keys. None: they are keys.
          pages: whose the slots of the one head are that is stored. None: of their own.
        """
        if self.key_rope == "window":
            sinks, rest = self._sinks_apart()
            how = dict(window=window, scale=scale)
            return combine([sinks.attend(_at_ranks(queries, ranks), **how), rest.attend(queries, **how)])
        q, q_pos = self._queries(queries, ranks), queries.pos
        k, k_gain = codecs.leaf_and_gain(self.k)
        v, v_gain = (None, k_gain) if self.v is None else codecs.leaf_and_gain(self.v)
        rotation = None
        if key_basis is not None:
            k, rotation = key_basis.of(k, queries.rope)
        elif self.key_rope != "stored" and queries.rope is not None:
            rotation = Rotation(queries.rope.inv_freq, ranks.slots if self.key_rope == "rank" else None)
        return decode_attention(
            q,
            k,
            v,
            q_pos,
            self.pos,
            bias=self.bias,
            k_gain=k_gain,
            v_gain=v_gain,
            rotation=rotation,
            pages=pages,
            window=None if self.outside_windows else window,
            scale=scale,
        )

    def mass(
        self,
        queries: Queries,
        lse: jax.Array,
        *,
        window: int | None = None,
        scale: Scale | None = None,
        ranks: Ranks | None = None,
        reduce: Reduce = "sum",
    ) -> jax.Array:
        """See `AnySegment.mass`."""
        if self.key_rope == "window":
            how = dict(window=window, scale=scale, reduce=reduce)
            each = [self.replace(key_rope="stored").mass(q, lse, **how) for q in (_at_ranks(queries, ranks), queries)]
            sinks = jnp.repeat(self.layout.is_sink(self.pos), lse.shape[2] // self.pos.shape[1], axis=1)
            return jnp.where(sinks, *each)
        q, k = self._queries(queries, ranks), codecs.decode(self.k, None if self.is_plain else queries.raw.dtype)
        if self.key_rope != "stored":
            k = rotate(k, self.pos if self.key_rope == "at_attend" else ranks.slots, queries.rope)
        if k.shape[0] != q.shape[0]:
            raise TypeError("A prefix shared by the batch has no per-row attention mass.")
        window = None if self.outside_windows else window
        return attention_mass(
            q, k, queries.pos, self.pos, lse, bias=self.bias, window=window, scale=scale, reduce=reduce
        )

    def dense(self) -> Segment:
        """Returns the slots with keys and values as arrays: itself, or what codes mean in float32."""
        k, v = (None if x is None else codecs.decode(x) for x in (self.k, self.v))
        return self.replace(k=k, v=v, replicated=False)

    def axes(self) -> Segment:
        """See `AnySegment.axes`."""
        named = self._map_parts(codecs.named_axes, lambda _: OF_SLOTS)
        return replicated_slots(named) if self.replicated else named

    def fields(self) -> Segment:
        """Returns the tree with the bits of a slot in place of every array: see `Encoded.fields`."""
        return self._map_parts(codecs.fields_of, lambda _: 0)

    # --- rewriting --------------------------------------------------------------------------------------------------

    def map_dense(self, body, tail) -> Segment:
        """See `AnySegment.map_dense`."""
        if not self.is_plain:
            raise ValueError("These slots are compressed already; put this transform before the one that made them.")
        return tail(self)

    def encoded(self, key_codec: Stored, value_codec: Stored) -> Segment:
        """Stores keys and values with other codecs, in as many slots as fill their blocks."""
        whole = math.lcm(codecs.block_of(key_codec), codecs.block_of(value_codec))

        def encode(slots: Segment) -> Segment:
            occupied = slots.slots.occupied
            stored = lambda codec, x: None if x is None else codecs.encode_like(codec, x, occupied)
            return slots.replace(k=stored(key_codec, slots.k), v=stored(value_codec, slots.v))

        return sharding.made_on_shards(encode, self.resize(-(-self.pos.shape[2] // whole) * whole))

    def edited(self, edit: Edit) -> Segment:
        """See `AnySegment.edited`: keys are turned in float32; learned slots, which have no position, stay."""
        if self.outside_windows:
            return self
        if self.bias is not None and not edit.alike:
            raise ValueError("Slots that stand for several tokens cannot be taken out or moved by position.")
        if edit.moves and getattr(self.layout, "sinks", 0):
            raise ValueError("A ring knows its first tokens by their positions and cannot be moved.")
        old = self.pos
        pos = jnp.where(old >= 0, jnp.maximum(edit.position(old), -1), old)
        moved = self.with_slots(pos=pos)
        if edit.rope is None or self.key_rope not in ("stored", "window"):
            return moved
        if not (codecs.is_array(self.k) and self.k.dtype.itemsize > 1 or edit.reencode):
            raise ValueError(
                "Rotated keys that are codes cannot be moved as they are: move before they are encoded, or let moved "
                "encode them again (reencode=True)."
            )
        k = re_rotate(codecs.decode(self.k), jnp.where(pos >= 0, pos - old, 0), edit.rope)
        return moved.replace(k=codecs.encode_like(self.k, k, pos >= 0))

    def encode_like(self, slots: Segment) -> Segment:
        """Stores other slots the way these are stored."""
        if self.is_plain:
            return slots.with_slots(stats={}).map_vectors(lambda x, like: codecs.store(x, like.dtype), self)
        return slots.with_slots(stats={}).encoded(self.k, self.k if self.v is None else self.v)

    def astype(self, dtype) -> Segment:
        """Stores arrays in another floating dtype."""
        return self.map_vectors(lambda x: codecs.store(x, dtype))

    def map_vectors(self, change: Callable[..., jax.Array], *others: Segment) -> Segment:
        """Puts `change(x, *of_others)` in place of its keys and, where it has them, of its values."""
        k, v = jax.tree.map(change, (self.k, self.v), *((other.k, other.v) for other in others))
        return self.replace(k=k, v=v)

    def no_slots(self) -> Segment:
        """Makes one like this without slots: where tokens that follow may go."""
        B, K, _, H = self.k.shape
        own_values = self.v is not None
        return Segment.empty(B, K, 0, H, self.k.dtype, own_values=own_values, key_rope=self.key_rope)

    # --- writing ----------------------------------------------------------------------------------------------------

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope | None) -> Segment:
        """See `AnySegment.append`. A segment without slots becomes the tokens: the start of a prefill."""
        if not self.by_slot:
            raise TypeError("These slots take whole blocks; append through a BlockedSegment.")
        new = self.slots_of(k, v, pos, rope)
        if self.pos.shape[2] == 0:
            return new._whole()
        if pos.shape[1] == 1 or self.layout.grows:
            return self.write(new)
        slots = self.pos.shape[2]
        return joined(self, new._whole()).newest(jnp.sum(self.pos[:, 0] != CLOSED, axis=-1), slots)

    def slots_of(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope | None) -> Segment:
        """Returns the tokens as a segment of their own: see `append`; stored as this one is, with its statistics."""
        if self.key_rope in ("stored", "window"):
            k = rotate(k, pos[:, None], rope)
        slot_pos = jnp.broadcast_to(pos[:, None], k.shape[:3])
        stored = lambda like, x: None if like is None else codecs.encode_like(like, x, slot_pos >= 0)
        return self.replace(k=stored(self.k, k), v=stored(self.v, v), slots=self.slots.fresh(slot_pos))

    def reserve(self, tokens: int) -> Segment:
        """Adds `tokens` empty slots, and as many more as `sharding.whole` wants; a ring stays as it is."""
        if not self.by_slot:
            raise TypeError("These slots take whole blocks; reserve through a BlockedSegment.")
        if not self.layout.grows:
            return self
        B, K, S = self.pos.shape
        return self.resize(sharding.whole(S + tokens, self.block, batch=B, kv_heads=K, tile=8))

    def resize(self, slots: int) -> Segment:
        """Pads with empty slots up to `slots`, rounded up to whole blocks; those of a ring stay empty.

        Raises:
          ValueError: there are more slots already.
        """
        S, block = self.pos.shape[2], self.block
        if slots < S:
            raise ValueError(f"slots must be at least {S}, got {slots}.")
        slots = -(-slots // block) * block
        if slots == S:
            return self
        return resized(self, slots).replace(slots=self.slots.resized(slots, -1 if self.layout.grows else CLOSED))

    def write(self, new: Segment) -> Segment:
        """Writes the occupied slots of `new` into the first empty ones; a single one where the layout says."""
        if new.pos.shape[2] > 1:
            return fill_slots(self, new)
        return self.put(jnp.argmin(self.layout.order(self.pos), axis=-1), new)

    def put(self, slot: jax.Array, new: Segment) -> Segment:
        """Writes the one slot of `new` over slot i32[B, K] of every row and head where it is occupied."""
        return write_slots(self, new, slot, new.pos[..., 0] >= 0)

    def drop(self, slots: jax.Array) -> Segment:
        """Empties the slots where bool[B, K, S] is true; their room is used again."""
        return self.with_slots(pos=jnp.where(slots, -1, self.pos))

    # --- selecting --------------------------------------------------------------------------------------------------

    def take(self, index: jax.Array, valid: jax.Array) -> Segment:
        """Gathers slots: i32[B, K, n] of them, bool[B, K, n] where the result is occupied; n grows to whole words."""
        extra = ((0, 0), (0, 0), (0, -index.shape[2] % self.block))
        index, valid = jnp.pad(index, extra), jnp.pad(valid, extra)
        taken = gather_slots(self, index, valid)
        return taken.with_slots(pos=jnp.where(valid, taken.pos, -1))

    def newest(self, rows: jax.Array, slots: int) -> Segment:
        """Returns the sinks of a ring and its newest slots, i32[B] `rows` of `slots`; it closes the others."""
        newest_last = jnp.where(self.layout.is_sink(self.pos), LAST, self.pos)
        kept = self.take(*keep_highest(newest_last, self.pos, slots, rows))
        open_slots = jnp.arange(kept.pos.shape[2]) < rows[:, None, None]
        return kept.with_slots(pos=jnp.where(open_slots, kept.pos, CLOSED))

    def first(self, slots: int) -> Segment:
        """Returns the first slots."""
        part = lambda x, spec: x if slot_axis(spec) < 0 else jax.lax.slice_in_dim(
            x, 0, x.shape[slot_axis(spec)] * slots // self.pos.shape[2], axis=slot_axis(spec)
        )
        return jax.tree.map(part, self, self.axes())

    def in_token_order(self, slots: int | None = None) -> Segment:
        """Sorts slots by position, empty ones last; of S or more, as many as `slots` says."""
        more = 0 if slots is None else slots - self.pos.shape[2]
        pos = jnp.pad(self.pos, ((0, 0), (0, 0), (0, more)), constant_values=-1)
        order = token_order(pos)
        return self.take(order, jnp.take_along_axis(pos, order, axis=-1) >= 0)

    def window(self, start: jax.Array, size: int) -> Segment:
        """Returns `size` slots of every row and head from its own i32[B, K] start; those beyond the end are empty."""
        index = start[..., None] + jnp.arange(size)
        there = index < self.pos.shape[2]
        index = jnp.where(there, index, 0)
        return self.take(index, there & (jnp.take_along_axis(self.pos, index, axis=-1) >= 0))

    def split_newest(self, count: int) -> tuple[Segment, Segment]:
        """Returns the older slots and the newest `count` of every row and head, both in token order."""
        S = self.pos.shape[2]
        ordered = self.in_token_order()
        held = jnp.sum(ordered.pos >= 0, axis=-1)
        older = jnp.maximum(held - count, 0)
        newest = ordered.window(older, count)
        rest = ordered.first(max(S - count, 0))
        return rest.drop(jnp.arange(rest.pos.shape[2]) >= older[..., None]), newest

    def oldest(self) -> Segment:
        """Returns the slot of every row and head that the next token takes: see `layout`."""
        slot = jnp.argmin(self.layout.order(self.pos), axis=-1)[..., None]
        return self.take(slot, jnp.take_along_axis(self.pos, slot, axis=-1) >= 0)

    # --- pages ------------------------------------------------------------------------------------------------------

    def flattened(self) -> Segment:
        """[B, P, page, ...] -> [B, 1, P * page, ...]: one head, whose slots are those of all P, one after the other."""

        def flat(x, spec):
            axis = slot_axis(spec)
            if axis < 0:
                return x
            x = jnp.moveaxis(x, 1, axis - 1)
            return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])[:, None]

        return jax.tree.map(flat, self, self.axes())

    def as_pages(self, pages: int) -> Segment:
        """Inverts `flattened`."""

        def apart(x, spec):
            axis = slot_axis(spec)
            if axis < 0:
                return x
            x = x[:, 0]
            x = x.reshape(*x.shape[: axis - 1], pages, -1, *x.shape[axis:])
            return jnp.moveaxis(x, axis - 1, 1)

        return jax.tree.map(apart, self, self.axes())

    # ----------------------------------------------------------------------------------------------------------------

    def _stored(self) -> tuple[Stored, ...]:
        return (self.k,) if self.v is None else (self.k, self.v)

    def _map_parts(self, stored, of_slots) -> Segment:
        v = None if self.v is None else stored(self.v)
        return self.replace(k=stored(self.k), v=v, slots=jax.tree.map(of_slots, self.slots))

    def _whole(self) -> Segment:
        """Counts the slots that codes were padded with."""
        slots = -(-self.pos.shape[2] // self.block) * self.block
        return self.replace(slots=self.slots.resized(slots))

    def _queries(self, queries, ranks):
        """[B, T, N, H], rotated as the keys are when they are read."""
        return (_at_ranks(queries, ranks) if self.key_rope == "rank" else queries).rotated

    def _sinks_apart(self) -> tuple[Segment, Segment]:
        """Returns the sinks of a ring, gathered, and its slots without them."""
        here = self.pos[:, :, None] == jnp.arange(self.layout.sinks)[:, None]  # [B, K, sinks, S]
        sinks = self.take(jnp.argmax(here, axis=-1), jnp.any(here, axis=-1))
        plain = dict(key_rope="stored", layout=Rows())
        return sinks.replace(**plain), self.drop(self.layout.is_sink(self.pos)).replace(**plain)


def _at_ranks(queries: Queries, ranks: Ranks | None) -> Queries:
    """The queries, rotated at their ranks."""
    if ranks is None:
        raise TypeError("Keys that are read at ranks are read through their layer cache, which counts them.")
    return queries._replace(raw=ranks.rotated_queries(queries), rope=None)


def unrotated(slots: Segment, rope: Rope) -> Segment:
    """Stores keys as they were before their rotation, to be rotated when read."""
    if slots.key_rope not in ("stored", "window"):
        return slots
    return slots.replace(k=re_rotate(slots.k, -slots.pos, rope), key_rope="at_attend")


def dense_tail(layer, transform: str) -> Segment:
    """Returns the layer cache's last segment, if it is one whose slots can be gathered, dropped and rewritten.

    Raises:
      ValueError: it is compressed; says which transform wanted it and what it found.
    """
    segment = layer.segments[-1]
    if not getattr(segment, "is_plain", False):
        raise ValueError(
            f"{transform} needs dense slots to choose from, got {_called(segment)}: put {transform} "
            "before the transform that made them."
        )
    return segment


def slot_tail(layer, transform: str) -> Segment:
    """Returns the layer cache's last segment, if it is one whose slots can be gathered and dropped, codes too.

    Raises:
      ValueError: its slots come in blocks; says which transform wanted it, what it found and what to do.
    """
    segment = layer.segments[-1]
    if not getattr(segment, "by_slot", False):
        raise ValueError(
            f"{transform} needs slots that can be kept and dropped one by one, got {_called(segment)}: put {transform} "
            "before the transform that made them, or store slots one by one, as quantize(residual=0) does."
        )
    return segment


def _called(segment) -> str:
    if isinstance(segment, Segment):
        return f"codes in blocks of {segment.block}" if not segment.by_slot else "slots that are codes"
    return f"a {type(segment).__name__}"
