"""Selecting and writing slots: the one gather order and the one in-place write of every segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kvjax import sharding
from kvjax.segments.axes import OF_SLOTS, P, rename, slot_axis
from pallas_kernels.partial import Partial, fold_tiles
from pallas_kernels.slot_write import takes_slot, write_slot
from pallas_kernels.tpu_tiles import LANES, SUBLANES

LAST = jnp.iinfo(jnp.int32).max
"""A position after every real one."""

CLOSED = -2
"""The position of a slot that is empty and stays so: a row of a ring may have fewer slots than the longest one."""

_EMPTY = jnp.iinfo(jnp.int32).min  # below -inf
_ABOVE_INFINITY = LAST - 0x7F800001  # integers between the bits of infinity and the highest; each is an age

_TILE = 512  # slots that are expanded at a time
_OF_ROWS = P("batch", "kv_heads")  # names of the axes of what is beside a segment
_MOST_GATHERED = 8192  # slots that go from shard to shard at a time
_UNROLL = 32  # rows * heads up to which writes are separate slices


def without_rounding(scores: jax.Array) -> jax.Array:
    """Drops the digits of scores that float32 arithmetic does not know: what it keeps is good to 3e-5.

    For scores that equal tokens share wherever they are: the order of a sum would choose among them, and that order
    changes with the batch and the machine. Where they are a tie, position decides.
    """
    return jax.lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=14)


def priority(scores: jax.Array, pos: jax.Array, protected: jax.Array | None = None) -> jax.Array:
    """Ranks slots by score: i32[..., S], of which only the order means anything; the highest are kept.

    Protected slots lie above every score, infinity too, the newest first; NaN counts as -inf; empty slots come last.
    Every selection of slots breaks ties by position, and keeps the earlier token: neither the slot that a token lies
    in nor its neighbours in the batch can decide.

    Args:
      scores: f32[..., S].
      pos: i32[..., S], -1 where a slot is empty.
      protected: bool[..., S].
    """
    x = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # 0 and -0 are a tie
    order = jnp.where(bits < 0, bits ^ LAST, bits)
    if protected is not None:
        age = jnp.max(pos, axis=-1, keepdims=True) - pos
        order = jnp.where(protected, LAST - jnp.minimum(age, _ABOVE_INFINITY), order)
    return jnp.where(pos >= 0, order, _EMPTY)


def highest_first(priority: jax.Array, pos: jax.Array) -> jax.Array:
    """i32[..., S]: the slots, from the highest priority to the lowest; of a tie the oldest first, empty ones last."""
    return _sorted(~jnp.where(pos >= 0, priority, _EMPTY), pos)


def lowest_first(priority: jax.Array, pos: jax.Array) -> jax.Array:
    """i32[..., S]: the slots, from the lowest priority to the highest; of a tie the newest first, empty ones last."""
    return _sorted(*_empty_last(priority, pos))


def _sorted(keys: jax.Array, then: jax.Array) -> jax.Array:
    keys, then = (_of_own_heads(x) if x.ndim == 3 else x for x in (keys, then))
    index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    return jax.lax.sort((keys, then, index), num_keys=2)[2]


def _empty_last(priority: jax.Array, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.where(pos >= 0, x, LAST) for x in (priority, ~pos))


def places(order: jax.Array) -> jax.Array:
    """i32[..., S]: where each slot is in an order of slots, i32[..., S]."""
    return jnp.argsort(order, axis=-1)


def highest_slot(x: jax.Array, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest of [..., S] and i32[...], the slot it is in: of a tie the one with the lowest position.

    In one pass: where a maximum and what equals it are found apart, a compiler may compute x twice and round it twice.
    """
    pos = jnp.broadcast_to(pos, x.shape)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    least = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min

    def larger(a, b):
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))
        return tuple(jnp.where(first, i, j) for i, j in zip(a, b))

    none = (jnp.asarray(least, x.dtype), jnp.int32(LAST), jnp.int32(0))
    highest, _, slot = jax.lax.reduce((x, pos, index), none, larger, (x.ndim - 1,))
    return highest, slot


def lowest_slot(priority: jax.Array, pos: jax.Array) -> jax.Array:
    """i32[...]: the occupied slot of lowest priority; of a tie the newest."""
    keys, then = (_of_own_heads(x) if x.ndim == 3 else x for x in _empty_last(priority, pos))
    return highest_slot(~keys, then)[1]


def lowest(priority: jax.Array, pos: jax.Array, count: jax.Array) -> jax.Array:
    """bool[B, K, S]: the `count` (i32[B, K]) slots of lowest priority of each head; of a tie the newest."""
    S = pos.shape[-1]

    def one():
        return (lowest_slot(priority, pos)[..., None] == jnp.arange(S)) & (count > 0)[..., None]

    def several():
        return places(lowest_first(priority, pos)) < count[..., None]

    # Decoding adds one token a call: a minimum is enough, and two sorts a layer are not paid for.
    return jax.lax.cond(jnp.max(count) <= 1, one, several)


def keep_highest(
    priority: jax.Array, pos: jax.Array, slots: int, count: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chooses which slots survive: those of highest priority, returned in slot order; of a tie the oldest.

    Args:
      priority: i32[B, K, S]; see `priority`.
      pos: i32[B, K, S]; slots where it is below 0 are never chosen.
      slots: how many slots the result has, at most S.
      count: i32[B], how many of each row to keep; None: `slots`.

    Returns:
      `(i32[B, K, slots], bool[B, K, slots])`: indices and which of them are real, for `take`.
    """
    index = highest_first(priority, pos)[..., :slots]
    valid = jnp.take_along_axis(pos, index, axis=-1) >= 0
    if count is not None:
        valid &= jnp.arange(slots) < count[:, None, None]
    in_slot_order = jnp.argsort(jnp.where(valid, index, LAST), axis=-1)
    return tuple(jnp.take_along_axis(x, in_slot_order, axis=-1) for x in (index, valid))


def _of_own_heads(x: jax.Array) -> jax.Array:
    """[B, K, S] numbers of slots, to be sorted: on a mesh every shard has those of all slots, for its heads alone."""
    return sharding.constrain(x, "batch", "kv_heads", None)


def keep_best(segment, priority: jax.Array, slots: int, rows: jax.Array):
    """The slots of a dense segment of highest priority i32[B, K, S], at most i32[B] `rows` of `slots`, in order.

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


def token_order(pos: jax.Array) -> jax.Array:
    """i32[B, K, S]: the slots sorted by position, empty ones last."""
    return jnp.argsort(_of_own_heads(jnp.where(pos < 0, LAST, pos)), axis=-1, stable=True)


def ranks(x: jax.Array) -> jax.Array:
    """i32: the place of each number of the last axis when sorted, 0 = lowest; ties in their order."""
    return jnp.argsort(jnp.argsort(x, axis=-1, stable=True), axis=-1)


def counts_by_owner(chosen: jax.Array, owner: jax.Array, owners: int) -> jax.Array:
    """i32[B, owners]: how many of the chosen (bool[B, M]) belong to each owner (i32[B, M])."""
    return sums_by_owner(chosen.astype(jnp.int32), owner, owners)


def sums_by_owner(x: jax.Array, owner: jax.Array, owners: int) -> jax.Array:
    """[B, owners]: sums of x[B, M] over what belongs to each owner (i32[B, M])."""
    return jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=owners))(x, owner)


def ranks_by_owner(x: jax.Array, owner: jax.Array, owners: int) -> jax.Array:
    """i32[B, M]: the place of each number among those of its owner, 0 = lowest; ties in their order."""
    order = jnp.lexsort((x, owner), axis=-1)
    held = counts_by_owner(jnp.ones(owner.shape, bool), owner, owners)
    first = jnp.cumsum(held, axis=-1) - held
    sorted_owner = jnp.take_along_axis(owner, order, axis=-1)
    place = jnp.arange(x.shape[-1]) - jnp.take_along_axis(first, sorted_owner, axis=-1)
    return jnp.take_along_axis(place, jnp.argsort(order, axis=-1), axis=-1)


def marked(index: jax.Array, valid: jax.Array, slots: int) -> jax.Array:
    """bool[B, K, slots]: which slots i32[B, K, n] names where bool[B, K, n] is true."""
    if index.shape[2] == 1:  # a token of a decoding step: no scatter
        return valid & (index == jnp.arange(slots))
    B, K, _ = index.shape
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    return jnp.zeros((B, K, slots), bool).at[rows, heads, jnp.where(valid, index, slots)].set(True, mode="drop")


def fold_slots(segment, attend: Callable[..., Partial], beside: Sequence[jax.Array], block: int) -> Partial:
    """`Segment.fold_dense` of one whose leaves can be cut every `block` slots, as its `axes` say."""
    S, axes = segment.pos.shape[2], (slot_axes(segment), (2,) * len(beside))

    def of_tile(start, size):
        tile, rest = slice_slots((segment, tuple(beside)), axes, S, start, size, block)
        return attend(tile.dense(), *rest)

    return fold_tiles(of_tile, S, max(_TILE // block, 1) * block)


def slot_axes(segment):
    """For every leaf of a segment, the axis along which slots lie; -1 where there is none."""
    return jax.tree.map(slot_axis, segment.axes())


def slice_slots(tree, axes, slots: int, start: jax.Array | int, size: int, block: int):
    """`size` slots from `start` on, of every leaf: what a tile of a packed segment is made of.

    Args:
      tree: whose leaves hold something for S slots: an entry for each, or some entries for every `block`.
      axes: the same tree of the axes they lie along; -1 where a leaf has nothing to do with slots.
      slots: [S].
      start: a multiple of `block`; may be traced.
      size: another.
      block: slots of the smallest piece that can be cut.
    """

    def part(x, axis):
        if axis < 0:
            return x
        entries = x.shape[axis] * block // slots  # of a block
        return jax.lax.dynamic_slice_in_dim(x, start // block * entries, size // block * entries, axis=axis)

    return jax.tree.map(part, tree, axes)


def written_after(read: jax.Array, *written: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays to write into a buffer, in an order with what was read from it.

    XLA copies a buffer that is read and written in no given order; making the written values depend on the result of
    the reading (through a test that never holds) gives the order, and the write happens in place.

    Args:
      read: computed from the buffer; finite.
      *written: what will be written.
    """
    never = jnp.any(read == jnp.inf)
    return tuple(jnp.where(never, jnp.zeros((), x.dtype), x) for x in written)


def write_slots(old, new, start: jax.Array, on: jax.Array):
    """Writes the n slots of one segment over slots `start .. start + n` of every row and head of another, in place.

    Args:
      old: of S slots; on a mesh every shard writes what falls on it.
      new: of the same representation.
      start: i32[B, K], multiples of n.
      on: bool[B, K]; where false, `old` stays as it is.
    """
    count, named = new.pos.shape[2], old.axes()
    split, axes = _split(named, old)

    def here(old, new, start, on):
        S = old.pos.shape[2]
        start = start - sharding.first_on_shard(axes, S)
        on = on & (start >= 0) & (start < S)

        def write(x, fresh, spec):
            axis = slot_axis(spec)
            if axis < 0:
                return x
            entries, heads = x.shape[axis] * count // S, x.shape[1]  # 1 head where all share their coordinates
            at = jnp.clip(start, 0, S - count) // count * entries
            return write_windows(x, fresh, at[:, :heads], on[:, :heads], axis)

        return jax.tree.map(write, old, new, named)

    to = sharding.specs(named, old, split)
    of_new = sharding.specs(rename(named, {"slots": None}), new, split)
    of_rows = sharding.specs(_OF_ROWS, start, split)
    return sharding.over_shards(here, (to, of_new, of_rows, of_rows), to)(old, new, start, on)


def fill_slots(old, new):
    """Writes the occupied slots of one segment, one after the other, into the first empty slots of another.

    What finds no empty slot is lost. On a mesh every shard fills its own, the first ones first.

    Args:
      old: whose leaves are all [B, K, S, ...].
      new: the same with n slots, the occupied ones first.
    """
    named = old.axes()
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
        put = lambda x, fresh: x.at[rows, heads, slot].set(fresh, mode="drop")
        return jax.tree.map(put, old, new)

    to = sharding.specs(named, old, split)
    of_new = sharding.specs(rename(named, {"slots": None}), new, split)
    return sharding.over_shards(here, (to, of_new), to)(old, new)


def gather_slots(segment, index: jax.Array, valid: jax.Array):
    """Slots i32[B, K, n] of a segment whose leaves are all [B, K, S, ...]; zeros where bool[B, K, n] is false.

    On a mesh each shard in turn gets its part of the result, summed over those that hold any of it, piece by piece.
    """
    named = segment.axes()
    split, axes = _split(named, segment)
    parts, count = sharding.shards(axes), index.shape[2]
    spread = parts > 1 and count % parts == 0  # or every shard gets all of it

    def pick(segment, index, valid):
        S = segment.pos.shape[2]
        index = index - sharding.first_on_shard(axes, S)
        valid = valid & (index >= 0) & (index < S)
        index = jnp.clip(index, 0, S - 1)

        def gather(x):
            expand = (...,) + (None,) * (x.ndim - 3)
            picked = jnp.take_along_axis(x, index[expand], axis=2)
            return jnp.where(valid[expand], picked, jnp.zeros((), x.dtype))

        picked = jax.tree.map(gather, segment)
        return jax.lax.psum(picked, axes) if axes else picked

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


def _piece(slots: int) -> int:
    """How many of a shard's slots are gathered at a time: what divides them, and is not much less than it may be."""
    piece = next(n for n in range(min(slots, _MOST_GATHERED), 0, -1) if slots % n == 0)
    return piece if 16 * piece >= min(slots, _MOST_GATHERED) else slots


def _split(named, segment):
    """How a segment is laid out, and the axes of the mesh that its slots are split over."""
    split = sharding.layout(sharding.sizes_of(named, segment))
    return split, split.get("slots", ())


def write_windows(
    old: jax.Array, new: jax.Array, start: jax.Array, on: jax.Array, axis: int = 2
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
    # On a TPU these make a matrix without a copy.
    fills_tiles = axis == 2 and old.ndim == 4 and old.shape[2] % SUBLANES == 0 and old.shape[3] % LANES == 0
    if fills_tiles and B * K <= _UNROLL:
        return jax.lax.platform_dependent(old, new, start, on, tpu=_write_rows, default=_write_slices)
    if axis == 2 and old.ndim == 4 and takes_slot(old, new):
        return _write_slot(old, new, start, on)
    return _write_slices(old, new, start, on, axis)


@jax.custom_jvp
def _write_slot(old, new, start, on):
    return jax.lax.platform_dependent(old, new, start, on, tpu=write_slot, default=_write_slices)


@_write_slot.defjvp
def _derivative_of_write_slot(primals, tangents):
    _, _, start, on = primals
    return _write_slot(*primals), _write_slices(*tangents[:2], start, on)  # linear in both; kernels have no rule


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
