"""Reads slots in a floating dtype as they lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_decode import Cost, Keys, Loader, Numbers, Stored, Values, product
from pallas_kernels.tpu_device import tpu_device
from pallas_kernels.tpu_tiles import slots_minor


def dense_keys(k: jax.Array, q: jax.Array, kv_heads: int) -> Keys:
    """Keys as they are; 8-bit floats are widened to the queries' dtype."""
    stored, factor, dtype = as_laid_out(k), widening_factor(k), q.dtype

    def queries(q, pos, tile):
        return q if factor == 1 else q * jnp.asarray(factor, q.dtype)

    def logits(q, pos, tile):
        tile = widened(tile, dtype)
        return product(q.astype(tile.dtype), tile, (1, 1 if stored.axis == 2 else 0))

    return Keys((stored,), logits, queries)


def dense_values(v: jax.Array, q: jax.Array, kv_heads: int) -> Values:
    """Values as they are."""
    stored, factor, dtype = as_laid_out(v), widening_factor(v), q.dtype

    def weigh(p, tile):
        tile = widened(tile, dtype)
        return (product(p.astype(tile.dtype), tile, (1, 0 if stored.axis == 2 else 1))[None],)

    return Values((stored,), ((1, v.shape[3]),), weigh, lambda total: factor * total[0], v.shape[3])


def as_laid_out(x: jax.Array) -> Stored:
    """`[B, K, S, H]` the way it lies in HBM.

    XLA:TPU lays arrays out so that padding to tiles of 128 lanes is least: with H minor where it fills lanes, with
    slots minor where it does not. A kernel sees arrays as they are indexed, so there a transposition is what avoids
    a transposed copy.
    """
    if slots_minor(x):
        return Stored(x.swapaxes(2, 3), 3)
    return Stored(x, 2)


def widened(tile: jax.Array, dtype) -> jax.Array:
    """8-bit floats in another dtype, over `widening_factor`; what is wider stays.

    Where the hardware does not widen float8_e4m3fn it does float8_e4m3b11fnuz, the same bits for a sixteenth of the
    number but for two: minus zero, which is taken out, and NaN, which is 480 there.
    """
    if tile.dtype.itemsize > 1:
        return tile
    if not _in_other_format(tile.dtype):
        return tile.astype(dtype)
    low = jnp.uint32(0x7F7F7F7F)
    words = pltpu.bitcast(tile, jnp.uint32)  # of four numbers, whose signs stay where other bits are set
    words &= ((words & low) + low) | low
    return pltpu.bitcast(words, jnp.float8_e4m3b11fnuz).astype(dtype)


def widening_factor(x: jax.Array) -> float:
    """What numbers of [B, K, S, H] are over those that `widened` makes of them."""
    return 16.0 if _in_other_format(x.dtype) else 1.0


def _in_other_format(dtype) -> bool:
    return dtype == jnp.float8_e4m3fn and not tpu_device().widens_e4m3fn


def vmem_bytes(x: jax.Array) -> float:
    """Of one slot of one head of `[B, K, S, H]`."""
    width = x.shape[3] if slots_minor(x) else -(-x.shape[3] // 128) * 128
    return width * x.dtype.itemsize


def cost(x: jax.Array, q: jax.Array, kv_heads: int) -> Cost:
    """See `Loader`; 8-bit floats are widened."""
    widened = x.shape[3] * q.dtype.itemsize if x.dtype.itemsize == 1 else 0
    return Cost(vmem_bytes(x) * x.shape[1] / kv_heads, widened, key=(("", x.dtype), ("width", x.shape[3])))


def _numbers(k: jax.Array, q: jax.Array) -> Numbers:
    stored = as_laid_out(k)
    return Numbers((stored,), lambda tile: widened(tile, q.dtype), stored.axis - 2, widening_factor(k))


loader = Loader(dense_keys, _numbers, dense_values, cost, lambda x, q, kv_heads, role: None)
