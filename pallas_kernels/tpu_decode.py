"""The skeleton of every decode kernel on TPU: tiles of slots times a way to read them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import result_like
from pallas_kernels.partial import Partial, combine
from pallas_kernels.tpu_decode_blocks import Blocks, heads_together
from pallas_kernels.tpu_device import tpu_device
from pallas_kernels.tpu_tiles import SUBLANES
from pallas_kernels.visibility import visible

MOST_ROWS = 128
"""Queries of a KV head: one pass of the matrix unit, which holds the slots."""

LEAST_SLOTS = 8  # Mosaic has no layout for a single one, and XLA fuses few of them with what is around


class Stored(NamedTuple):
    """An array of which every tile of slots needs a part: [B, K or 1, ...]."""

    array: jax.Array
    axis: int | None  # along which slots lie; None: it belongs to the head
    slots: int = 1  # that an entry along `axis` stands for
    mixed: bool = False  # keys: whether a number of one slot reaches the logits of others, which NaN may not


class Keys(NamedTuple):
    """Keys in some representation."""

    stored: tuple[Stored, ...]
    logits: Callable[..., jax.Array]  # (queries, pos i32[1, s], *tiles) -> f32[R, s]
    queries: Callable[..., Any] = lambda q, pos, *tiles: q  # (q [R, H], pos, *tiles) -> what `logits` begins with


class Values(NamedTuple):
    """Values in some representation. What is summed over tiles need not be the output yet."""

    stored: tuple[Stored, ...]
    sums: tuple[tuple[int, int], ...]  # (n, X): sums f32[n, R, X]
    weigh: Callable[..., tuple[jax.Array, ...]]  # (p f32[R, s], *tiles) -> what the tile adds to each
    output: Callable[..., jax.Array]  # (*sums) -> f32[R, H']
    width: int  # [H']


class Cost(NamedTuple):
    """What reading one slot of a KV head takes."""

    stored: float  # bytes of a tile in VMEM
    expanded: float = 0.0  # bytes that are made of them there
    step: int = 1  # slots that cannot be parted: of words and of groups, with the rows that a block must have of both
    key: tuple[tuple[str, Any], ...] = ()  # of an entry of the table of block sizes, beside what all kernels have


class Numbers(NamedTuple):
    """Slots that are decoded in VMEM, for what has to be done to keys before they meet a query."""

    stored: tuple[Stored, ...]
    decoded: Callable[..., jax.Array]  # (*tiles) -> [s, R] or [R, s], over `factor`
    slots: int  # the axis of slots, 0 or 1
    factor: float = 1.0


class Loader(NamedTuple):
    """How one type of keys or values is read. All take an array, the queries and the KV heads of a program."""

    keys: Callable[[Any, jax.Array, int], Keys]
    numbers: Callable[[Any, jax.Array], Numbers]
    values: Callable[[Any, jax.Array, int], Values]
    cost: Callable[[Any, jax.Array, int], Cost]  # from shapes and dtypes alone
    unsupported: Callable[[Any, jax.Array, int, str], str | None]  # the last is "keys" or "values"


def attend(
    q: jax.Array,
    keys: Keys,
    values: Values,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    v_gain: jax.Array | None = None,
    within: tuple[jax.Array, jax.Array] | None = None,
    *,
    sizes: Blocks,
    window: int | None,
    scale: float | None,
) -> Partial:
    """`decode_attention` over slots in any representation.

    The grid walks rows, heads, parts of the slots and, innermost, tiles of a part, over which an online softmax keeps
    its maximum, its sum and the weighted values. A last tile that reaches over the end is masked, never padded in HBM.
    The queries of a KV head are rows of whole registers; fewer than a register holds are there several times.

    Args:
      q: [B, T, N, H].
      keys: what logits come from; its tiles [s, ...] or, with slots minor, [..., s].
      values: what they weigh.
      q_pos: i32[B, T].
      k_pos: i32[B, K or 1, S].
      bias: f32[B, K or 1, S] or None, added to the logits.
      v_gain: f32[B, K or 1, S] or None, what weights of values are multiplied by.
      within: (i32[B], i32[B]), the first slot of every row and the one behind its last; what lies beyond S does not
        count. The grid then has as many tiles as the longest run touches, and nothing is read beyond a row's own. None:
        all S.
      sizes: heads, slots and splits of the grid.
      window: tokens, or None.
      scale: None: `H ** -0.5`.
    """
    B, T, N, H = q.shape
    S = k_pos.shape[2]
    numbers = {"pos": k_pos, "bias": bias, "v_gain": v_gain}
    numbers = {name: x for name, x in numbers.items() if x is not None}
    per_slot = [number_per_slot(x if name == "pos" else x.astype(jnp.float32)) for name, x in numbers.items()]
    stored = [*per_slot, *keys.stored, *values.stored]
    K = max(x.array.shape[1] for x in stored)
    G = N // K
    scale = H**-0.5 if scale is None else scale
    rows = (q.reshape(B, T, K, G, H) * jnp.asarray(scale, q.dtype)).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    row_pos = jnp.repeat(q_pos, G, axis=1)[..., None]
    R, period = padded_rows(q, K), repeated_rows(q, K)
    missing = (0, period - T * G)
    rows = jnp.tile(jnp.pad(rows, ((0, 0), (0, 0), missing, (0, 0))), (1, 1, R // period, 1))
    row_pos = jnp.tile(jnp.pad(row_pos, ((0, 0), missing, (0, 0)), constant_values=-1), (1, R // period, 1))
    tiles = -(-S // sizes.slots)
    splits, bounds = sizes.splits, ()
    if within is not None:
        begin, end = (jnp.clip(x.astype(jnp.int32), 0, S) for x in within)
        last = jnp.maximum(end - 1, begin) // sizes.slots
        part = jnp.max(last - begin // sizes.slots) // splits + 1
        bounds = begin, end, part[None]
    elif tiles % splits:
        part, splits = tiles, 1
    else:
        part = tiles // splits
    per_head = lambda *shape: pl.BlockSpec((1, sizes.heads, *shape), lambda b, h, i, t, *_: (b, h) + (0,) * len(shape))
    result = lambda width: pl.BlockSpec((1, 1, sizes.heads, R, width), lambda b, h, i, t, *_: (i, b, h, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel, keys=keys, values=values, slots=S, window=window, numbers=tuple(numbers), bounded=bool(bounds)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(bounds),
            grid=(B, K // sizes.heads, splits, part),
            in_specs=[
                per_head(R, H),
                pl.BlockSpec((1, R, 1), lambda b, h, i, t, *_: (b, 0, 0)),
                *(
                    _block(x, sizes, functools.partial(_tile, sizes.slots, tiles, None if bounds else part))
                    for x in stored
                ),
            ],
            out_specs=[result(values.width), result(1)],
            scratch_shapes=[
                pltpu.VMEM((sizes.heads, R, 1), jnp.float32),
                pltpu.VMEM((sizes.heads, R, 1), jnp.float32),
                *(pltpu.VMEM((sizes.heads, n, R, width), jnp.float32) for n, width in values.sums),
            ],
        ),
        out_shape=[
            result_like((splits, B, K, R, width), jnp.float32, q, q_pos, *(x.array for x in stored))
            for width in (values.width, 1)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu_device().vmem_bytes,
        ),
        name="decode_attention",
    )(*bounds, rows, row_pos, *(x.array for x in stored))

    def by_token(x):
        x = x[..., : T * G, :].reshape(splits, B, K, T, G, -1)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(splits, B, T, N, -1)

    out, lse = by_token(out), by_token(lse)[..., 0]
    return combine([Partial(out[i], lse[i]) for i in range(splits)])


def with_gain(keys: Keys, gain: jax.Array | None) -> Keys:
    """Keys that are multiplied by f32[B, K or 1, S], if it is given."""
    if gain is None:
        return keys
    return Keys(
        (*keys.stored, number_per_slot(gain.astype(jnp.float32))),
        lambda q, pos, *tiles: keys.logits(q, pos, *tiles[:-1]) * tiles[-1],
        lambda q, pos, *tiles: keys.queries(q, pos, *tiles[:-1]),
    )


def number_per_slot(x: jax.Array) -> Stored:
    """[B, K, S] the way it lies in HBM: heads that do not fill a tile's rows lie one by one where there is one row."""
    B, K, _ = x.shape
    if B == 1 and K % SUBLANES and K not in (1, 2, 4):
        return Stored(x[:, :, None], 3)
    return Stored(x, 2)


def _tile(slots: int, tiles: int, part: int | None, b, i, t, *bounds):
    """The tile that a step of the grid sees. With bounds a step beyond a row's run sees its last, which is there."""
    if part is not None:
        return i * part + t
    begin, end, part = bounds
    first, last = (jax.lax.div(x, jnp.int32(slots)) for x in (begin[b], jnp.maximum(end[b] - 1, begin[b])))
    return jnp.minimum(first + i * part[0] + t, jnp.minimum(last, tiles - 1))


def _block(stored: Stored, sizes: Blocks, tile: Callable[..., jax.Array]) -> pl.BlockSpec:
    """The part of an array that a step of the grid sees."""
    shape = list(stored.array.shape)
    shared = shape[1] == 1  # by all heads
    shape[0], shape[1] = 1, 1 if shared else sizes.heads
    if stored.axis is not None:
        shape[stored.axis] = sizes.slots // stored.slots
    by_row = stored.array.shape[0] > 1

    def index(b, h, i, t, *bounds):
        at = [0] * len(shape)
        at[0], at[1] = b if by_row else 0, 0 if shared else h
        if stored.axis is not None:
            at[stored.axis] = tile(b, i, t, *bounds)
        return tuple(at)

    return pl.BlockSpec(tuple(shape), index)


def _kernel(*refs, keys, values, slots, window, numbers, bounded):
    """One tile of every head of a block.

    begin_ref, end_ref i32[B] and part_ref i32[1] if bounded; q_ref [1, k, R, H]; row_pos_ref i32[1, R, 1];
    positions i32[1, k or 1, s] or [1, k or 1, 1, s], and the other numbers of slots alike in f32; tiles of keys and
    values; out_ref f32[1, 1, k, R, H'], lse_ref f32[1, 1, k, R, 1]; m_ref, l_ref f32[k, R, 1]; sums.
    """
    bounds, (q_ref, row_pos_ref, *refs) = (refs[:3], refs[3:]) if bounded else ((), refs)
    number_refs, refs = dict(zip(numbers, refs)), refs[len(numbers) :]
    pos_ref = number_refs["pos"]
    key_refs, refs = refs[: len(keys.stored)], refs[len(keys.stored) :]
    value_refs, refs = refs[: len(values.stored)], refs[len(values.stored) :]
    out_ref, lse_ref, m_ref, l_ref, *sum_refs = refs
    step, steps = pl.program_id(3), pl.num_programs(3)

    @pl.when(step == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        for ref in (l_ref, *sum_refs):
            ref[...] = jnp.zeros_like(ref)

    size = pos_ref.shape[-1]
    start = (pl.program_id(2) * steps + step) * size
    overhang = slots % size != 0
    if bounded:
        begin, end = (ref[pl.program_id(0)] for ref in bounds[:2])
        start += jax.lax.div(begin, jnp.int32(size)) * size
    elif overhang:
        begin, end = 0, slots

    def of_head(ref, head):
        if ref.ndim == 3:  # numbers of slots: [1, s]
            return ref[0, pl.ds(head, 1)] if ref.shape[1] > 1 else ref[0]
        return ref[0, head if ref.shape[1] > 1 else 0]

    def attend_to_heads(heads):
        """Step by step for all of them: what one waits for is hidden behind the work of the others."""
        # What lies beyond the end may be NaN, which a probability of zero does not remove.
        clean = lambda tile, x: _within(tile, slots - start, x) if overhang else tile

        def with_numbers(name, function, rows):
            """`function(rows, numbers f32[1, s])` of a name that is there; NaN beyond the end is taken for zero."""
            if name not in number_refs:
                return rows
            found = [of_head(number_refs[name], head) for head in heads]
            found = [jnp.where(pos >= 0, x, 0.0) if overhang else x for x, pos in zip(found, positions)]
            return [function(x, number) for x, number in zip(rows, found)]

        key_tiles = [
            [clean(of_head(ref, h), x) if x.mixed else of_head(ref, h) for ref, x in zip(key_refs, keys.stored)]
            for h in heads
        ]
        positions = [of_head(pos_ref, head) for head in heads]
        if bounded or overhang:
            slot = start + jax.lax.broadcasted_iota(jnp.int32, positions[0].shape, 1)
            positions = [jnp.where((slot >= begin) & (slot < end), pos, -1) for pos in positions]
        queries = [of_head(q_ref, head) for head in heads]
        queries = [keys.queries(*x) for x in _listed(queries, positions, key_tiles)]
        logits = [keys.logits(*x) for x in _listed(queries, positions, key_tiles)]
        logits = with_numbers("bias", operator.add, logits)
        logits = [jnp.where(_visible(row_pos_ref[0], pos, window), x, -jnp.inf) for x, pos in zip(logits, positions)]
        before = [m_ref[head] for head in heads]
        most = [jnp.maximum(m, jnp.max(x, axis=1, keepdims=True)) for m, x in zip(before, logits)]
        shift = [jnp.where(m == -jnp.inf, 0.0, m) for m in most]
        kept = [jnp.exp(m - x) for m, x in zip(before, shift)]
        p = [jnp.exp(x - y) for x, y in zip(logits, shift)]
        sums = [jnp.sum(x, axis=1, keepdims=True) for x in p]
        p = with_numbers("v_gain", operator.mul, p)
        value_tiles = [[clean(of_head(ref, h), x) for ref, x in zip(value_refs, values.stored)] for h in heads]
        added = [values.weigh(x, *tiles) for x, tiles in zip(p, value_tiles)]
        for i, head in enumerate(heads):
            m_ref[head] = most[i]
            l_ref[head] = kept[i] * l_ref[head] + sums[i]
            for ref, more in zip(sum_refs, added[i]):
                ref[head] = kept[i][None] * ref[head] + more

    def attend_to_all():
        together = heads_together(q_ref.shape[1], size, q_ref.shape[2])
        _for_every(q_ref.shape[1] // together)(
            lambda i: attend_to_heads([i * together + j for j in range(together)])
        )

    if bounded:
        pl.when(start < end)(attend_to_all)
    else:
        attend_to_all()

    @pl.when(step == steps - 1)
    def _():

        @_for_every(q_ref.shape[1])
        def _(head):
            total, m = l_ref[head], m_ref[head]
            empty = total == 0.0
            total = jnp.where(empty, 1.0, total)  # the logarithm of zero is the hardware's business
            out_ref[0, 0, head] = values.output(*(ref[head] for ref in sum_refs)) / total
            lse_ref[0, 0, head] = jnp.where(empty, -jnp.inf, m + jnp.log(total))


def _listed(first, positions, tiles):
    return [(x, pos, *rest) for x, pos, rest in zip(first, positions, tiles)]


def _for_every(count: int):
    """Runs a function of an index: a loop, so that the program does not grow with the heads."""

    def run(body):
        if count == 1:
            return body(0)
        jax.lax.fori_loop(0, count, lambda i, _: body(i), None)

    return run


def _visible(row_pos, pos, window):
    """bool[R, s] of i32[R, 1] and i32[1, s]: `visible`, with rows in place of tokens."""
    return visible(row_pos[:, 0], pos[0], window)


def _within(tile, left, stored: Stored):
    """The tile with zeros where it reaches beyond the last slot; integers hold no NaN."""
    if stored.axis is None or not jnp.issubdtype(tile.dtype, jnp.floating):
        return tile
    if stored.axis == 3:
        tile = tile.astype(jnp.float32)  # Mosaic does not broadcast a mask over 16-bit rows
    index = jax.lax.broadcasted_iota(jnp.int32, tile.shape, stored.axis - 2) * stored.slots
    return jnp.where(index < left, tile, jnp.zeros_like(tile))


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """f32 `a @ b` (or over other axes) on the matrix unit; float32 operands are not rounded to bfloat16."""
    exact = jnp.float32 in (a.dtype, b.dtype)
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def transposed(x: jax.Array) -> jax.Array:
    """f32[X, s] of [s, X]: 16-bit numbers by the matrix unit, which has nothing else to do."""
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32).T
    shape = x.shape[1], x.shape[1]
    same = jax.lax.broadcasted_iota(jnp.int32, shape, 0) == jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return product(same.astype(jnp.float32).astype(x.dtype), x, (1, 1))


def logits_bytes(q: jax.Array, heads: int) -> float:
    """Of one slot: logits, mask and probabilities of the queries of a KV head, in float32 and once in theirs."""
    return 16.0 * padded_rows(q, heads)


def repeated_rows(q: jax.Array, heads: int) -> int:
    """Rows after which the queries of a KV head begin again: 1, 2, 4, or whole registers of 8."""
    rows = q.shape[1] * q.shape[2] // heads
    return next((n for n in (1, 2, 4) if n >= rows), -(-rows // SUBLANES) * SUBLANES)


def padded_rows(q: jax.Array, heads: int) -> int:
    """Queries of a KV head in whole registers, which few of them fill by being there several times."""
    return -(-repeated_rows(q, heads) // SUBLANES) * SUBLANES


def sum_of_copies(x: jax.Array, period: int) -> jax.Array:
    """f32[R, X]: the sum over the rows that hold the same query, in each of them."""
    while period < SUBLANES:
        x += pltpu.roll(x, period, 0)
        period *= 2
    return x


def row_limit(q: jax.Array, heads: int, slots: int) -> str | None:
    """Returns why so many queries or slots are unsupported by every decode kernel, or None."""
    rows = q.shape[1] * q.shape[2] // heads
    if rows > MOST_ROWS:
        return f"takes up to {MOST_ROWS} queries a KV head, got T * G = {rows} of q {list(q.shape)}"
    if slots < LEAST_SLOTS:
        return f"takes {LEAST_SLOTS} slots or more, got S = {slots}"
    return None
