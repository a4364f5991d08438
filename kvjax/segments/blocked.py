"""A compressed body with a dense tail that flushes into it block by block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int32

from kvjax import sharding
from kvjax.axes import cut_slots, heads_alike, slot_axis
from kvjax.rope import Rope
from kvjax.segments.edits import Edit
from kvjax.segments.indices import Chosen, bytes_of
from kvjax.segments.moves import write_slots
from kvjax.segments.protocol import AnySegment, KeyRope, Queries
from kvjax.segments.segment import Segment
from pallas_kernels.partial import Partial, combine


@struct.dataclass
class BlockedSegment:
    """New tokens land in `tail`; whenever a row and head has `block` of them, they are encoded into `body`.

    The body is any segment with `encode_like(Segment)`. Rows and heads flush each
    on their own, so a row of a padded batch holds what its own run holds. The newest `length mod block`
    tokens are exact.

    Between the two may lie bands of a fixed number of blocks, the newest first: the oldest block of a full band makes
    room by moving to the next one, or to the body, where it is decoded and encoded again.
    """

    body: AnySegment
    tail: Segment  # `block` slots
    bands: tuple[Segment, ...] = ()

    @classmethod
    def from_dense(cls, slots: Segment, encode, block: int, bands: Sequence[tuple] = ()) -> BlockedSegment:
        """Encodes the whole blocks of each row, in token order; the remainder stays dense.

        Args:
          slots: what to store.
          encode: `Segment -> body`, for a number of slots that is a multiple of `block`.
          block: slots of a block, and of the tail.
          bands: `(encode, blocks)` of each band, the newest first.
        """
        if not slots.layout.grows:
            raise TypeError("BlockedSegment cannot keep a ring: blocks are written once and never overwritten.")
        B, K, S = slots.pos.shape
        slots = slots.with_slots(stats={})  # nothing scores slots once they are encoded
        slots = slots.in_token_order(sharding.whole(S, block, batch=B, kv_heads=K))
        occupied = jnp.sum(slots.pos >= 0, axis=-1, keepdims=True)
        full = occupied // block * block
        in_body = jnp.arange(slots.pos.shape[2]) < full
        tail = slots.resize(max(slots.pos.shape[2], block)).window(full[..., 0], block)
        younger = []
        for encode_band, blocks in bands:
            first = jnp.maximum(full - blocks * block, 0)
            part = slots.resize(max(slots.pos.shape[2], blocks * block)).window(first[..., 0], blocks * block)
            part = part.drop(jnp.arange(blocks * block) >= full - first)
            younger.append(encode_band(part.replace(replicated=True)))
            full = first
            in_body = jnp.arange(slots.pos.shape[2]) < full
        body = slots.drop(~in_body)
        if bands:
            fewest = max(S - block * sum(blocks for _, blocks in bands), 0)
            body = body.first(sharding.whole(fewest, block, batch=B, kv_heads=K))
        return cls(encode(body), tail.replace(replicated=True), tuple(younger))

    def axes(self) -> BlockedSegment:
        """See `AnySegment.axes`; all shards have the tail."""
        body, tail, bands = self.body.axes(), self.tail.axes(), tuple(band.axes() for band in self.bands)
        return heads_alike(self.replace(body=body, tail=tail, bands=bands), body, tail, *bands)

    @property
    def key_rope(self) -> KeyRope:
        """The body's; the tail's is the same."""
        return self.body.key_rope

    @property
    def pos(self) -> Int32[Array, "B K S_body+S_bands+block"]:
        """i32[B, K, S_body + S_bands + block]."""
        return jnp.concatenate([part.pos for part in self._all()], axis=-1)

    @property
    def selects(self) -> bool:
        """Whether queries choose what they read of the body: see `SelectedSegment`."""
        return getattr(self.body, "selects", False)

    def choose(self, queries: Queries, **how) -> Chosen:
        """Chooses pages of the body, see `SelectedSegment.choose`."""
        return self.body.choose(queries, **how) if self.body.pos.shape[2] else Chosen()

    def chosen_on_shard(self, chosen: Chosen, axes: tuple[str, ...]) -> Chosen:
        """See `SelectedSegment.chosen_on_shard`."""
        return self.body.chosen_on_shard(chosen, axes)

    def bytes_read(self, queries: int = 1) -> int:
        """Returns the bytes that attention reads for a call."""
        of_body = getattr(self.body, "bytes_read", lambda _: bytes_of(self.body))
        return of_body(queries) + bytes_of((self.bands, self.tail))

    def bytes_on_host(self) -> int:
        """Returns the bytes that are kept in host memory."""
        return getattr(self.body, "bytes_on_host", lambda: 0)()

    def attend(self, queries: Queries, *, chosen: Chosen | None = None, **how) -> Partial:
        """See `AnySegment.attend`; of the body what is `chosen`, if anything is."""
        of_body = {} if chosen is None else {"chosen": chosen}
        parts = [(part, ranked | (of_body if part is self.body else {})) for part, ranked in self._ranked(how)]
        return combine([part.attend(queries, **own, **how) for part, own in parts])

    def mass(self, queries: Queries, lse: jax.Array, **how) -> jax.Array:
        """See `AnySegment.mass`."""
        each = [sharding.mass(part, queries, lse, **ranked, **how) for part, ranked in self._ranked(how)]
        return jnp.concatenate(each, axis=-1)

    def _ranked(self, how: dict) -> list[tuple[AnySegment, dict]]:
        """The parts, each with its part of the ranks in `how`, which are removed there."""
        ranks = how.pop("ranks", None)
        if ranks is None:
            return [(part, {}) for part in self._parts()]
        ends = list(itertools.accumulate(part.pos.shape[2] for part in self._all()))[:-1]
        of = [ranks._replace(slots=x) for x in jnp.split(ranks.slots, ends, axis=-1)]
        return [(p, {"ranks": r}) for p, r in zip(self._all(), of) if p.pos.shape[2]]

    def dense(self) -> Segment:
        """Body, bands and tail as one dense segment, float32."""
        join = lambda *x: jnp.concatenate([y.astype(x[0].dtype) for y in x], axis=2)
        return jax.tree.map(join, *(part.dense() for part in self._parts()))

    def map_dense(self, body, tail) -> BlockedSegment:
        """See `AnySegment.map_dense`: the body, which is written in whole blocks; the tail stays exact."""
        # What is written in blocks of the tail is encoded in such blocks.
        body = getattr(body, "in_blocks", lambda tokens: body)(self.tail.pos.shape[2])
        bands = tuple(band.map_dense(body, body) for band in self.bands)
        return self.replace(body=self.body.map_dense(body, body), bands=bands)

    def edited(self, edit: Edit) -> BlockedSegment:
        """See `AnySegment.edited`. A block is written again when all of it is empty."""
        bands = tuple(band.edited(edit) for band in self.bands)
        return self.replace(body=self.body.edited(edit), tail=self.tail.edited(edit), bands=bands)

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> BlockedSegment:
        """See `AnySegment.append`."""
        if pos.shape[1] == 1:
            return self._append_one(k, v, pos, rope)
        block, T = self.tail.pos.shape[2], pos.shape[1]
        pending = jnp.sum(self.tail.pos >= 0, axis=-1)  # [B, K]
        arriving = jnp.sum(pos >= 0, axis=-1)[:, None]
        flushes = (pending + arriving) // block  # [B, K], blocks that fill up
        most = (block - 1 + T) // block
        both = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b], axis=2),
            self.tail,
            self.tail.slots_of(k, v, pos, rope),
        )
        ordered = both.resize(max(block + T, (most + 1) * block)).in_token_order()
        whole = ordered.first(most * block)
        in_body = jnp.arange(most * block) < (flushes * block)[..., None]
        if self.bands:
            each = [ordered.window(jnp.full(flushes.shape, j * block), block) for j in range(most)]
            after = self
            for j, one in enumerate(each):
                after = after._descend(one, j < flushes)
            return after.replace(tail=ordered.window(flushes * block, block))
        blocks = self._encode(whole.drop(~in_body), jnp.any(flushes > 0))
        return self.replace(
            body=self._write(blocks, flushes, most), tail=ordered.window(flushes * block, block)
        )

    def _append_one(self, k, v, pos, rope) -> BlockedSegment:
        """`append` of a single token: a tail that fills up is one block, already in order."""
        tail = self.tail.append(k, v, pos, rope)
        full = jnp.all(tail.pos >= 0, axis=-1)  # [B, K]
        if self.bands:
            return self._descend(tail, full).replace(tail=tail.drop(full[..., None]))
        blocks = self._encode(tail, jnp.any(full))
        return self.replace(
            body=self._write(blocks, full.astype(jnp.int32), 1), tail=tail.drop(full[..., None])
        )

    def reserve(self, tokens: int) -> BlockedSegment:
        """Grows the body by the blocks that `tokens` more tokens can fill, and as `sharding.whole` wants."""
        block = self.tail.pos.shape[2]
        B, K, S = self.body.pos.shape
        rows = self._entries_of_a_block()
        tile = math.lcm(*(8 // math.gcd(8, n) for n in rows))
        extra = sharding.whole(S + -(-tokens // block) * block, block, batch=B, kv_heads=K, tile=tile) - S
        if S == 0:
            none = self.tail.replace(replicated=False).first(0).resize(block)  # not `extra` dense slots, to be encoded
            return self.replace(body=self.body.encode_like(none).resize(extra))
        return self.replace(body=self.body.resize(S + extra))

    def _entries_of_a_block(self) -> list[int]:
        """Returns how many entries every array of the body has for a block: of scales that tokens share, few."""
        block, S = self.tail.pos.shape[2], self.body.pos.shape[2]
        axes = [slot_axis(spec) for spec in jax.tree.leaves(self.body.axes())]
        return [x.shape[a] * block // S for x, a in zip(jax.tree.leaves(self.body), axes) if S and a >= 0]

    def _parts(self) -> list[AnySegment]:
        """All parts that have slots: a body may have none yet."""
        return [part for part in self._all() if part.pos.shape[2]]

    def _all(self) -> tuple[AnySegment, ...]:
        """The oldest first."""
        return (self.body, *reversed(self.bands), self.tail)

    def _descend(self, new: Segment, on: jax.Array) -> BlockedSegment:
        """Moves a block into the first band where bool[B, K] `on`, and what that displaces one band further."""
        block, bands, B, K = self.tail.pos.shape[2], [], *on.shape
        for band in self.bands:
            newest = jnp.max(band.pos.reshape(B, K, -1, block), axis=-1)
            at = block * jnp.argmin(newest, axis=-1)  # an empty block, or the oldest
            oldest = lambda band, at=at: band.dense().astype(new.k.dtype).window(at, block).replace(replicated=True)
            shapes = jax.eval_shape(oldest, band)
            nothing = lambda _, shapes=shapes: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            displaced = jax.lax.cond(jnp.any(on), oldest, nothing, band)
            fresh = self._encode(new, jnp.any(on), band).replace(replicated=True)
            bands.append(write_slots(band, fresh, at, on))
            new, on = displaced, on & (jnp.min(newest, axis=-1) >= 0)
        body = self._write(self._encode(new, jnp.any(on)), on.astype(jnp.int32), 1)
        return self.replace(body=body, bands=tuple(bands))

    def _encode(self, slots: Segment, needed: jax.Array, like: AnySegment | None = None) -> AnySegment:
        """Encodes slots when any are needed. Only the small result crosses the branch, never the body."""

        def encode(slots: Segment) -> AnySegment:
            encode = (self.body if like is None else like).encode_like
            return sharding.made_on_shards(encode, slots.replace(replicated=False), split_slots=False)

        shapes = jax.eval_shape(encode, slots)
        nothing = lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(needed, encode, nothing, slots)

    def _write(self, blocks: AnySegment, flushes: jax.Array, most: int) -> Segment:
        """Writes block j of each row and head at its j-th free block, where j < flushes."""
        block = self.tail.pos.shape[2]
        B, K, S = self.body.pos.shape
        if S == 0:
            return self.body
        free = jnp.all(self.body.pos.reshape(B, K, S // block, block) < 0, axis=-1)
        order = jnp.argmin(~free, axis=-1)[..., None] if most == 1 else jnp.argsort(~free, axis=-1, stable=True)

        named = blocks.axes()

        def write(j, body):
            fresh = cut_slots(blocks, named, most * block, j * block, block, block)
            at = jax.lax.dynamic_index_in_dim(order, jnp.minimum(j, S // block - 1), axis=-1, keepdims=False)
            return write_slots(body, fresh, at * block, j < flushes)

        # A loop of its own for one block would be a second one around a decoding step's.
        return write(0, self.body) if most == 1 else jax.lax.fori_loop(0, most, write, self.body)
