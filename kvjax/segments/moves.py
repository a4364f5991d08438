"""Moving slots: the one gather and the one in-place write of every codec in every layout.

A segment says for each of its arrays along which axis slots lie (`axes`) and, where these are words, how many bits of a
word belong to a slot (`fields`); everything here follows from the two.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kvjax import sharding
from kvjax.axes import OF_SLOTS, P, rename, slot_axis
from kvjax.segments.hosted import in_host_memory, write_hosted_windows
from kvjax.segments.slots import keep_highest
from pallas_kernels.slot_write import takes_slot, write_slot
from pallas_kernels.tpu_tiles import LANES, SUBLANES
from pallas_kernels.words import WORD_BITS, pack, unpack

_OF_ROWS = P("batch", "kv_heads")  # names of the axes of what is beside a segment
_MOST_GATHERED = 8192  # slots that go from shard to shard at a time
_UNROLL = 32  # rows * heads up to which writes are separate slices


def written_after(read: jax.Array, *written: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays to write into a buffer, in an order with what was read from it.

    XLA copies a buffer that is read and written in no given order; making the written values depend on the result of
    the reading (through a test that never holds) gives the order, and the write happens in place.

    Args:
      read: computed from the buffer; finite.
      *written: what will be written.
    """
    never = jnp.any(read == jnp.inf)
    return tuple(jnp.where(never, jnp.zeros((), x.dtype), x) for x in written)


def resized(segment: Any, slots: int) -> Any:
    """Pads every array of a segment with empty slots, up to `slots`; positions are the caller's."""
    S = segment.pos.shape[2]

    def pad(x, spec, bits):
        axis = slot_axis(spec)
        if axis < 0:
            return x
        entries = x.shape[axis] * slots // S if S else slots * bits // WORD_BITS if bits else slots
        extra = [(0, 0)] * x.ndim
        extra[axis] = (0, entries - x.shape[axis])
        return jnp.pad(x, extra)

    return jax.tree.map(pad, segment, segment.axes(), segment.fields())


def joined(first: Any, second: Any) -> Any:
    """Puts the slots of two segments of one kind one after the other."""
    join = lambda a, b, spec: a if slot_axis(spec) < 0 else jnp.concatenate([a, b], axis=slot_axis(spec))
    return jax.tree.map(join, first, second, first.axes())


def write_slots(old: Any, new: Any, start: Int32[Array, "B K"], on: Bool[Array, "B K"]) -> Any:
    """Writes the n slots of one segment over slots `start .. start + n` of every row and head of another, in place.

    Args:
      old: of S slots; on a mesh every shard writes what falls on it.
      new: of the same kind; more slots than n are padding of whole words.
      start: i32[B, K], multiples of n.
      on: bool[B, K]; where false, `old` stays as it is.
    """
    count, named, fields = new.pos.shape[2], old.axes(), old.fields()
    split, axes = _split(named, old)

    def here(old, new, start, on):
        S = old.pos.shape[2]
        start = start - sharding.first_on_shard(axes, S)
        on = on & (start >= 0) & (start < S)
        at = jnp.clip(start, 0, S - count)

        def write(x, fresh, spec, bits):
            axis = slot_axis(spec)
            if axis < 0:
                return x
            heads = x.shape[1]  # 1 where all share their coordinates
            if bits and count * bits < WORD_BITS:
                return _write_field(x, fresh, at[:, :heads], on[:, :heads], bits)
            entries = x.shape[axis] * count // S
            fresh = jax.lax.slice_in_dim(fresh, 0, entries, axis=axis)
            return write_windows(x, fresh, at[:, :heads] // count * entries, on[:, :heads], axis)

        return jax.tree.map(write, old, new, named, fields)

    to = sharding.specs(named, old, split)
    of_new = sharding.specs(rename(named, {"slots": None}), new, split)
    of_rows = sharding.specs(_OF_ROWS, start, split)
    return sharding.over_shards(here, (to, of_new, of_rows, of_rows), to)(old, new, start, on)


def _write_field(words: jax.Array, new: jax.Array, slot: jax.Array, on: jax.Array, bits: int) -> jax.Array:
    """Replaces the bits of slot i32[B, K] in u32[B, K, W, H] by those that are lowest in u32[B, K, 1, H]."""
    per = WORD_BITS // bits
    at, shift = slot // per, ((slot % per) * bits).astype(jnp.uint32)[..., None, None]
    ones = jnp.uint32(2**bits - 1)
    kept = jnp.take_along_axis(words, at[..., None, None], axis=2) & ~(ones << shift)
    return write_windows(words, kept | ((new[:, :, :1] & ones) << shift), at, on)


def fill_slots(old: Any, new: Any) -> Any:
    """Writes the occupied slots of one segment, one after the other, into the first empty slots of another.

    What finds no empty slot is lost. On a mesh every shard fills its own, the first ones first.

    Args:
      old: whose slots are written one by one (`Encoded.by_slot`).
      new: of the same kind with n slots, the occupied ones first.
    """
    named, fields = old.axes(), old.fields()
    split, axes = _split(named, old)

    def here(old, new):
        B, K, S = old.pos.shape
        filled = jnp.cumsum(old.pos < 0, axis=-1, dtype=jnp.int32)  # [B, K, S]: empty slots up to each
        nth = jnp.broadcast_to(jnp.arange(1, new.pos.shape[2] + 1), new.pos.shape)  # the empty slot each takes
        if axes:
            counts = jax.lax.all_gather(filled[..., -1], axes)  # [shards, B, K]
            before = jnp.arange(counts.shape[0])[:, None, None] < jax.lax.axis_index(axes)
            nth = nth - jnp.sum(jnp.where(before, counts, 0), axis=0)[..., None]
        find = jax.vmap(jax.vmap(lambda row, n: jnp.searchsorted(row, n)))
        slot = jnp.where((nth > 0) & (new.pos >= 0), find(filled, nth), S)  # S: nowhere
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]

        def put(x, fresh, spec, bits):
            axis = slot_axis(spec)
            if axis < 0:
                return x
            if axis == 3:
                fresh = jax.lax.slice_in_dim(fresh, 0, slot.shape[2], axis=3).swapaxes(2, 3)
                return x.at[rows, heads, :, slot].set(fresh, mode="drop")
            if not bits:
                return x.at[rows, heads, slot].set(fresh[:, :, : slot.shape[2]], mode="drop")
            per, ones = WORD_BITS // bits, jnp.uint32(2**bits - 1)
            word, shift = slot // per, ((slot % per) * bits).astype(jnp.uint32)[..., None]
            union = lambda fields: jnp.zeros_like(x).at[rows, heads, word].add(fields, mode="drop")  # none overlap
            field = unpack(fresh, bits)[:, :, : slot.shape[2]] << shift
            return (x & ~union(jnp.broadcast_to(ones << shift, field.shape))) | union(field)

        return jax.tree.map(put, old, new, named, fields)

    to = sharding.specs(named, old, split)
    of_new = sharding.specs(rename(named, {"slots": None}), new, split)
    return sharding.over_shards(here, (to, of_new), to)(old, new)


def gather_slots(segment: Any, index: jax.Array, valid: jax.Array) -> Any:
    """Gathers slots i32[B, K, n]; zeros where bool[B, K, n] is false. Codes are never decoded.

    On a mesh each shard in turn gets its part of the result, summed over those that hold any of it, piece by piece.

    Args:
      segment: whose slots are gathered one by one (`Encoded.by_slot`).
      index: n is a multiple of the slots of a word.
      valid: which of the result are real.
    """
    named, fields = segment.axes(), segment.fields()
    split, axes = _split(named, segment)
    parts, count = sharding.shards(axes), index.shape[2]
    packed = any(jax.tree.leaves(fields))
    spread = parts > 1 and count > 0 and count % parts == 0 and not packed  # or every shard gets all of it

    def pick(segment, index, valid):
        S = segment.pos.shape[2]
        index = index - sharding.first_on_shard(axes, S)
        valid = valid & (index >= 0) & (index < S)
        index = jnp.clip(index, 0, S - 1)

        def gather(x, spec, bits):
            axis = slot_axis(spec)
            if axis < 0:
                return x
            per = WORD_BITS // bits if bits else 1
            expand = lambda y: jnp.expand_dims(y, [i for i in range(2, x.ndim) if i != axis])
            picked = jnp.take_along_axis(x, expand(index // per), axis=axis)
            if bits:
                shift = ((index % per) * bits).astype(jnp.uint32)[..., None]
                picked = (picked >> shift) & jnp.uint32(2**bits - 1)
            return jnp.where(expand(valid), picked, jnp.zeros((), x.dtype))

        add = lambda x, spec: jax.lax.psum(x, axes) if axes and slot_axis(spec) >= 0 else x
        picked = jax.tree.map(gather, segment, named, fields)
        return jax.tree.map(lambda x, bits: pack(x, bits) if bits else x, jax.tree.map(add, picked, named), fields)

    def here(segment, index, valid):
        if not spread:
            return pick(segment, index, valid)
        size = count // parts
        piece = _piece(size)
        mine = jax.lax.axis_index(axes)

        def turn(i, kept):
            rows = [jax.lax.dynamic_slice_in_dim(x, i * piece, piece, axis=2) for x in (index, valid)]
            at, here = i * piece % size, i * piece // size == mine

            def put(new, old):
                there = jax.lax.dynamic_slice_in_dim(old, at, piece, axis=2)
                return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(here, new, there), at, axis=2)

            return jax.tree.map(put, pick(segment, *rows), kept)

        # Known only with the indices, or a compiler makes the room of every such loop of a program when it begins.
        zero, _ = jax.lax.optimization_barrier((jnp.zeros(()), index))
        room = lambda x: jnp.full((*x.shape[:2], size, *x.shape[3:]), zero, x.dtype)
        return jax.lax.fori_loop(0, count // piece, turn, jax.tree.map(room, segment))

    of_result = split if spread else split | {"slots": ()}
    rows = sharding.specs(_OF_ROWS, index, split)
    out = jax.tree.map(lambda spec, x: sharding.specs(spec, x, of_result), named, segment)
    return sharding.over_shards(here, (sharding.specs(named, segment, split), rows, rows), out)(segment, index, valid)


def keep_best(segment: Any, priority: jax.Array, slots: int, rows: jax.Array) -> Any:
    """Keeps the slots of highest priority i32[B, K, S], at most i32[B] `rows` of `slots`, in order.

    On a mesh the best of all shards, or, with `use_mesh(select_per_shard=True)`, an equal number of each.
    """
    if not sharding.selects_per_shard():
        return segment.take(*keep_highest(priority, segment.pos, slots, rows))
    named = segment.axes()
    split, axes = _split(named, segment)
    parts = sharding.shards(axes)

    def here(segment, priority, rows):
        count = min(-(-slots // parts), segment.pos.shape[2])
        first = jax.lax.axis_index(axes) < rows % parts if axes else False
        return segment.take(*keep_highest(priority, segment.pos, count, rows // parts + first))

    to = sharding.specs(named, segment, split)
    given = (to, sharding.specs(OF_SLOTS, priority, split), sharding.specs(P("batch"), rows, split))
    return sharding.over_shards(here, given, to)(segment, priority, rows)


def _piece(slots: int) -> int:
    """How many of a shard's slots are gathered at a time: what divides them, and is not much less than it may be."""
    piece = next(n for n in range(min(slots, _MOST_GATHERED), 0, -1) if slots % n == 0)
    return piece if 16 * piece >= min(slots, _MOST_GATHERED) else slots


def _split(named, segment):
    """How a segment is laid out, and the axes of the mesh that its slots are split over."""
    split = sharding.layout(sharding.sizes_of(named, segment))
    return split, split.get("slots", ())


def write_windows(
    old: Float[Array, "B K ..."], new: jax.Array, start: Int32[Array, "B K"], on: Bool[Array, "B K"], axis: int = 2
) -> jax.Array:
    """Writes `new` over a window of every row and head, where `on` is true.

    The rest of `old` is not touched, so XLA updates a donated buffer in place.

    Args:
      old: [B, K, ...] with slots along `axis`.
      new: the same with fewer slots.
      start: i32[B, K], first slot of the window.
      on: bool[B, K]; where false, `old` stays as it is.
      axis: of the slots.
    """
    B, K = start.shape
    if in_host_memory(old):
        return write_hosted_windows(old, new, start, on, axis)
    # On a TPU these make a matrix without a copy.
    fills_tiles = axis == 2 and old.ndim == 4 and old.shape[2] % SUBLANES == 0 and old.shape[3] % LANES == 0
    if fills_tiles and B * K <= _UNROLL:
        return jax.lax.platform_dependent(old, new, start, on, tpu=_write_rows, default=_write_slices)
    if axis == 2 and old.ndim == 4 and takes_slot(old, new):
        return _write_slot(old, new, start, on)
    if axis == 3 and takes_slot(old.swapaxes(2, 3), new.swapaxes(2, 3)):
        return _write_column(old, new, start, on)
    return _write_slices(old, new, start, on, axis)


@jax.custom_jvp
def _write_slot(old, new, start, on):
    return jax.lax.platform_dependent(old, new, start, on, tpu=write_slot, default=_write_slices)


@_write_slot.defjvp
def _derivative_of_write_slot(primals, tangents):
    _, _, start, on = primals
    return _write_slot(*primals), _write_slices(*tangents[:2], start, on)  # linear in both; kernels have no rule


def _write_column(old, new, start, on):
    """`write_windows` of one slot of [B, K, n, S]."""
    swapped = lambda old, new, start, on: write_slot(old.swapaxes(2, 3), new.swapaxes(2, 3), start, on).swapaxes(2, 3)
    slices = lambda *args: _write_slices(*args, axis=3)
    return jax.lax.platform_dependent(old, new, start, on, tpu=swapped, default=slices)


def _write_slices(old, new, start, on, axis=2):
    size, at = new.shape[axis], axis - 2

    def one(old, new, start, on):
        kept = jax.lax.dynamic_slice_in_dim(old, start, size, axis=at)
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(on, new, kept), start, axis=at)

    B, K = start.shape
    if B * K > _UNROLL:
        return jax.vmap(jax.vmap(one))(old, new, start, on)
    # A batched slice becomes a scatter, which XLA's CPU backend runs as a loop (a fifth slower decoding).
    for b in range(B):
        for k in range(K):
            origin = [b, k] + [0] * (old.ndim - 2)
            origin[axis] = start[b, k]
            sizes = (1, 1, *new.shape[2:])
            kept = jax.lax.dynamic_slice(old, origin, sizes)
            fresh = jnp.where(on[b, k], new[b : b + 1, k : k + 1], kept)
            old = jax.lax.dynamic_update_slice(old, fresh, origin)
    return old


def _write_rows(old, new, start, on):
    """`write_windows` of slots that are rows of a matrix.

    XLA:TPU lays out a buffer that is written at a dynamic index with that axis outermost. Kernels read slots next to
    channels, so every step would copy the buffer there and back; a matrix has no other axis to move.
    """
    B, K, S, H = old.shape
    rows = old.reshape(B * K * S, H)
    for b in range(B):
        for k in range(K):
            at = (b * K + k) * S + start[b, k]
            kept = jax.lax.dynamic_slice_in_dim(rows, at, new.shape[2])
            rows = jax.lax.dynamic_update_slice_in_dim(rows, jnp.where(on[b, k], new[b, k], kept), at, axis=0)
    return rows.reshape(old.shape)
