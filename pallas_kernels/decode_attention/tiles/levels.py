"""Reads codes of levels: words are unpacked in VMEM, and every code is replaced by its level there."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tiles.word_rows import BLOCK, halves, in_order, of_half
from pallas_kernels.levels import Levels
from pallas_kernels.tpu_decode import Cost, Keys, Loader, Numbers, Stored, Values, product
from pallas_kernels.tpu_tiles import LANES, SUBLANES
from pallas_kernels.words import WORD_BITS, planes

_UPPER = 8  # levels that a register's sublanes hold; 16 are two registers


def _stored(x: Levels) -> tuple[Stored, ...]:
    per = (WORD_BITS // width * x.in_row for width in planes(x.bits))
    table = jnp.pad(x.table.astype(jnp.float32), (0, 2 * _UPPER - len(x.table)))
    of_lanes = jnp.broadcast_to(table[:, None], (1, 1, 2 * _UPPER, LANES))
    return *(Stored(words, 2, n) for words, n in zip(x.planes, per)), Stored(of_lanes, None)


def _restored(words: list[jax.Array], table: jax.Array, bits: int, dtype) -> jax.Array:
    """u32[s * b / 32, X] of every plane of b bits and levels f32[16, 128] -> levels [s, X].

    A level is fetched from the sublane of the table that a code names, eight codes of each lane at a time: where there
    are 16 levels from both halves of the table, of which the code's sign bit chooses one.
    """
    if bits == 4:
        code = pltpu.bitcast(words[0], jnp.int4).astype(jnp.int32)
        low = code & 7
        return jnp.where(code < 0, _fetched(table[_UPPER:], low), _fetched(table[:_UPPER], low)).astype(dtype)
    if bits == 2:
        code = pltpu.bitcast(words[0], jnp.int2).astype(jnp.int32) & 3
    else:
        code = _spread(words[0], jnp.uint16, 2) | _spread(words[1], jnp.uint8, 1) << 2
        code = pltpu.bitcast(code, jnp.int4).astype(jnp.int32)
    return _fetched(table[:_UPPER], code).astype(dtype)


def _fetched(table: jax.Array, code: jax.Array) -> jax.Array:
    """f32[8, 128] at i32[s, X], codes from 0 to 7."""
    s, width = code.shape
    code = code.reshape(s // SUBLANES, SUBLANES, width)
    table = jnp.broadcast_to(jnp.concatenate([table] * (width // LANES), axis=1), code.shape)
    return jnp.take_along_axis(table, code, axis=1, mode="promise_in_bounds").reshape(s, width)


def _spread(words: jax.Array, part, bits: int) -> jax.Array:
    """u32[w, X] of codes of one or two bits -> u32 that hold eight codes of four bits; `part` is as wide as eight."""
    words = pltpu.bitcast(words, part).astype(jnp.uint32)
    field = 4  # codes that stay beside one another
    while field:
        mask = sum(((1 << field * bits) - 1) << i for i in range(0, WORD_BITS, 4 * field))
        words = (words | words << field * (4 - bits)) & jnp.uint32(mask)
        field //= 2
    return words


def level_keys(k: Levels, q: jax.Array, kv_heads: int) -> Keys:
    """Levels of the keys."""
    dtype, bits, per = q.dtype, k.bits, WORD_BITS // planes(k.bits)[0]

    def logits(q, pos, *tiles):
        *words, table = tiles
        levels = _restored(words, table, bits, dtype)
        if k.in_row == 1:
            return product(q.astype(dtype), levels, (1, 1))
        R = q.shape[0]
        stacked = jnp.concatenate([of_half(q, 0), of_half(q, 1)], axis=0).astype(dtype)
        found = product(stacked, levels, (1, 1))
        return in_order(found[:R], found[R:], per, dtype)

    return Keys(_stored(k), logits)


def level_values(v: Levels, q: jax.Array, kv_heads: int) -> Values:
    """Levels of the values."""
    dtype, bits, per, H = q.dtype, v.bits, WORD_BITS // planes(v.bits)[0], v.shape[3]

    def weigh(p, *tiles):
        *words, table = tiles
        levels = _restored(words, table, bits, dtype)
        if v.in_row == 1:
            return (product(p.astype(dtype), levels)[None],)
        stacked = jnp.concatenate(halves(p, per, dtype), axis=0).astype(dtype)
        first, second = jnp.split(product(stacked, levels), 2, axis=0)
        lane = jax.lax.broadcasted_iota(jnp.int32, first.shape, 1)
        return (jnp.where(lane < H, first, second)[None],)

    def output(total):
        return sum(total[0, :, i : i + H] for i in range(0, total.shape[2], H))

    return Values(_stored(v), ((1, v.planes[0].shape[3]),), weigh, output, H)


def cost(x: Levels, q: jax.Array, kv_heads: int) -> Cost:
    """See `Loader`; codes are as wide as float32 when they are looked up."""
    width = -(-x.shape[3] // LANES) * LANES
    lanes = -(-x.planes[0].shape[3] // LANES) * LANES
    stored = lanes / x.in_row * x.bits / 8 * x.planes[0].shape[1] / kv_heads
    key = (("", f"levels{x.bits}"), ("width", x.shape[3]))
    step = math.lcm(SUBLANES * x.block, BLOCK if x.in_row > 1 else 1)
    return Cost(stored, width * (8 + q.dtype.itemsize), step, key)


def _unsupported(x: Levels, q: jax.Array, kv_heads: int, role: str) -> str | None:
    if x.shape[3] % LANES and x.in_row * x.shape[3] != LANES:
        return f"takes {role} of levels that fill {LANES} lanes, got {x.shape[3]} channels, {x.in_row} in a row"
    if x.in_row > 1 and (x.in_row > 2 or x.shape[2] % BLOCK):
        return f"takes one or two runs in a row of a multiple of {BLOCK} slots, got {x.in_row} in a row of {x.shape[2]}"
    return None


def _numbers(k: Levels, q: jax.Array) -> Numbers:
    def decoded(*tiles):
        *words, table = tiles
        return _restored(words, table, k.bits, q.dtype)

    return Numbers(_stored(k), decoded, 0)


loader = Loader(level_keys, _numbers, level_values, cost, _unsupported)
