"""Reads codes of levels: words are unpacked in VMEM, and every code is replaced by its level there."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tiles.word_rows import BLOCK, halves, in_order, of_half
from pallas_kernels.levels import Levels
from pallas_kernels.tpu_decode import Cost, Keys, Loader, Stored, Values, product
from pallas_kernels.tpu_tiles import LANES, SUBLANES
from pallas_kernels.words import WORD_BITS, planes

_CODE = 4  # bits of a code when it is looked up


def _stored(x: Levels) -> tuple[Stored, ...]:
    per = (WORD_BITS // width * x.in_row for width in planes(x.bits))
    table = jnp.pad(x.table, (0, LANES - len(x.table)))[None, None, None]
    return *(Stored(words, 2, n) for words, n in zip(x.planes, per)), Stored(table, None)


def _restored(words: list[jax.Array], table: jax.Array, bits: int, dtype) -> jax.Array:
    """u32[s * b / 32, H] of every plane of b bits -> levels [s, H]."""
    code = sum(_in_nibbles(x, plane) << shift for x, plane, shift in zip(words, planes(bits), (0, 2)))
    code = pltpu.bitcast(code, jnp.uint4).astype(jnp.int32)
    table = jnp.broadcast_to(table, (code.shape[0], LANES))
    found = [
        jnp.take_along_axis(table, code[:, i : i + LANES], axis=1, mode="promise_in_bounds")
        for i in range(0, code.shape[1], LANES)
    ]
    return jnp.concatenate(found, axis=1).astype(dtype)


def _in_nibbles(words: jax.Array, bits: int) -> jax.Array:
    """u32[w, H] of codes of 4, 2 or 1 bits -> u32[w * 4 / bits, H], four bits a code."""
    if bits == _CODE:
        return words
    rows, width = words.shape
    half = WORD_BITS // 2
    parts = [_spread(words & jnp.uint32(0xFFFF), bits), _spread(words >> half, bits)]
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 2, width), 1)
    apart = jnp.where(row == 0, parts[0][:, None], parts[1][:, None]).reshape(2 * rows, width)
    return _in_nibbles(apart, 2 * bits)


def _spread(words: jax.Array, bits: int) -> jax.Array:
    """Moves the codes of the lower half of a word apart, so that each has twice its bits."""
    field = WORD_BITS // 4
    while field >= bits:
        mask = sum(((1 << field) - 1) << i for i in range(0, WORD_BITS, 2 * field))
        words = (words | (words << field)) & jnp.uint32(mask)
        field //= 2
    return words


def level_keys(k: Levels, q: jax.Array, kv_heads: int) -> Keys:
    """Levels of the keys."""
    dtype, bits, per = q.dtype, k.bits, WORD_BITS // k.bits

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
    dtype, bits, per, H = q.dtype, v.bits, WORD_BITS // v.bits, v.shape[3]

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
    if x.in_row > 1 and (x.bits == 3 or x.in_row > 2 or x.shape[2] % BLOCK):
        return f"takes two words in a row of 2 or 4 bits and a multiple of {BLOCK} slots, got {x.bits} bits"
    return None


loader = Loader(level_keys, level_values, cost, _unsupported)
