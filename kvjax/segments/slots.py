"""Selecting slots: the one order in which they are ranked, and who of a tie is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from kvjax import sharding

LAST = jnp.iinfo(jnp.int32).max
"""A position after every real one."""

CLOSED = -2
"""The position of a slot that is empty and stays so: a row of a ring may have fewer slots than the longest one."""

_EMPTY = jnp.iinfo(jnp.int32).min  # below -inf
_ABOVE_INFINITY = LAST - 0x7F800001  # integers between the bits of infinity and the highest; each is an age


def without_rounding(scores: jax.Array) -> jax.Array:
    """Drops the digits of scores that float32 arithmetic does not know: what it keeps is good to 3e-5.

    For scores that equal tokens share wherever they are: the order of a sum would choose among them, and that order
    changes with the batch and the machine. Where they are a tie, position decides.
    """
    return jax.lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=14)


def priority(
    scores: Float32[Array, "... S"], pos: Int32[Array, "... S"], protected: Bool[Array, "... S"] | None = None
) -> jax.Array:
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


def highest_first(priority: jax.Array, pos: jax.Array) -> Int32[Array, "... S"]:
    """i32[..., S]: the slots, from the highest priority to the lowest; of a tie the oldest first, empty ones last."""
    return _sorted(~jnp.where(pos >= 0, priority, _EMPTY), pos)


def lowest_first(priority: jax.Array, pos: jax.Array) -> Int32[Array, "... S"]:
    """i32[..., S]: the slots, from the lowest priority to the highest; of a tie the newest first, empty ones last."""
    return _sorted(*_empty_last(priority, pos))


def _sorted(keys: jax.Array, then: jax.Array) -> jax.Array:
    keys, then = (_of_own_heads(x) if x.ndim == 3 else x for x in (keys, then))
    index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    return jax.lax.sort((keys, then, index), num_keys=2)[2]


def _empty_last(priority: jax.Array, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.where(pos >= 0, x, LAST) for x in (priority, ~pos))


def places(order: jax.Array) -> Int32[Array, "... S"]:
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


def lowest_slot(priority: jax.Array, pos: jax.Array) -> Int32[Array, " ..."]:
    """i32[...]: the occupied slot of lowest priority; of a tie the newest."""
    keys, then = (_of_own_heads(x) if x.ndim == 3 else x for x in _empty_last(priority, pos))
    return highest_slot(~keys, then)[1]


def lowest(priority: jax.Array, pos: jax.Array, count: jax.Array) -> Bool[Array, "B K S"]:
    """bool[B, K, S]: the `count` (i32[B, K]) slots of lowest priority of each head; of a tie the newest."""
    S = pos.shape[-1]

    def one():
        return (lowest_slot(priority, pos)[..., None] == jnp.arange(S)) & (count > 0)[..., None]

    def several():
        return places(lowest_first(priority, pos)) < count[..., None]

    # Decoding adds one token a call: a minimum is enough, and two sorts a layer are not paid for.
    return jax.lax.cond(jnp.max(count) <= 1, one, several)


def keep_highest(
    priority: Int32[Array, "B K S"], pos: Int32[Array, "B K S"], slots: int, count: Int32[Array, " B"] | None = None
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


def few_highest(
    scores: Float32[Array, "R K P"],
    pos: Int32[Array, "R K P"],
    count: int,
    protected: Bool[Array, "R K P"] | None = None,
    rows: Int32[Array, " R"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses few of many, the highest scores first; of a tie the oldest. Nothing is sorted: cheap enough for a step.

    Args:
      scores: f32[R, K, P], of R rows or queries; NaN counts as the lowest.
      pos: i32[R, K, P], distinct in what is there, below 2^22; below 0 is never chosen.
      count: how many, at most P.
      protected: bool[R, K, P], chosen before all others, the newest first.
      rows: i32[R], how many of each row, at most `count`; None: `count`.

    Returns:
      `(i32[R, K, count], bool[R, K, count])`: indices, in no promised order, and which of them are real.
    """
    most = jnp.finfo(jnp.float32).max
    x = jnp.clip(jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32)), -most, most / 4)
    if protected is not None:
        age = jnp.max(pos, axis=-1, keepdims=True) - pos
        x = jnp.where(protected, most * (1 - age.astype(jnp.float32) * 2.0**-23), x)
    x = _of_own_heads(jnp.where(pos >= 0, x, -jnp.inf))
    highest, index = jax.lax.top_k(x, count)
    last = highest[..., -1:]
    if rows is not None:
        last = jnp.take_along_axis(highest, jnp.maximum(rows - 1, 0)[:, None, None], axis=-1)
    above = jnp.sum(x > last, axis=-1, keepdims=True)
    _, oldest = jax.lax.top_k(jnp.where(x == last, -_of_own_heads(pos).astype(jnp.float32), -jnp.inf), count)
    place = jnp.arange(count)
    tied = jnp.take_along_axis(oldest, jnp.maximum(place - above, 0), axis=-1)
    valid = highest > -jnp.inf
    if rows is not None:
        valid &= place < rows[:, None, None]
    return jnp.where(place < above, index, tied), valid


def _of_own_heads(x: jax.Array) -> jax.Array:
    """[B, K, S] numbers of slots, to be sorted: on a mesh every shard has those of all slots, for its heads alone."""
    return sharding.constrain(x, "batch", "kv_heads", None)


def token_order(pos: jax.Array) -> Int32[Array, "B K S"]:
    """i32[B, K, S]: the slots sorted by position, empty ones last."""
    return jnp.argsort(_of_own_heads(jnp.where(pos < 0, LAST, pos)), axis=-1, stable=True)


def ranks(x: jax.Array) -> jax.Array:
    """i32: the place of each number of the last axis when sorted, 0 = lowest; ties in their order."""
    return jnp.argsort(jnp.argsort(x, axis=-1, stable=True), axis=-1)


def counts_by_owner(chosen: jax.Array, owner: jax.Array, owners: int) -> Int32[Array, "B owners"]:
    """i32[B, owners]: how many of the chosen (bool[B, M]) belong to each owner (i32[B, M])."""
    return sums_by_owner(chosen.astype(jnp.int32), owner, owners)


def sums_by_owner(x: jax.Array, owner: jax.Array, owners: int) -> Float[Array, "B owners"]:
    """[B, owners]: sums of x[B, M] over what belongs to each owner (i32[B, M])."""
    return jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=owners))(x, owner)


def ranks_by_owner(x: jax.Array, owner: jax.Array, owners: int) -> Int32[Array, "B M"]:
    """i32[B, M]: the place of each number among those of its owner, 0 = lowest; ties in their order."""
    order = jnp.lexsort((x, owner), axis=-1)
    held = counts_by_owner(jnp.ones(owner.shape, bool), owner, owners)
    first = jnp.cumsum(held, axis=-1) - held
    sorted_owner = jnp.take_along_axis(owner, order, axis=-1)
    place = jnp.arange(x.shape[-1]) - jnp.take_along_axis(first, sorted_owner, axis=-1)
    return jnp.take_along_axis(place, jnp.argsort(order, axis=-1), axis=-1)


def marked(index: jax.Array, valid: jax.Array, slots: int) -> Bool[Array, "B K slots"]:
    """bool[B, K, slots]: which slots i32[B, K, n] names where bool[B, K, n] is true."""
    if index.shape[2] == 1:  # a token of a decoding step: no scatter
        return valid & (index == jnp.arange(slots))
    B, K, _ = index.shape
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    return jnp.zeros((B, K, slots), bool).at[rows, heads, jnp.where(valid, index, slots)].set(True, mode="drop")
