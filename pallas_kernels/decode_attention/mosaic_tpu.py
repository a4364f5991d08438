"""`decode_attention` on TPU: slots in a floating dtype, read as they lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sizes
from pallas_kernels.dispatch import Kernel
from pallas_kernels.partial import Partial
from pallas_kernels.tpu_decode import Keys, Stored, Values, attend, logits_bytes, padded_rows, product, row_limit
from pallas_kernels.tpu_decode_blocks import Blocks, blocks
from pallas_kernels.tpu_device import tpu_device
from pallas_kernels.tpu_tiles import slots_minor


def dense_keys(k: jax.Array, dtype) -> Keys:
    """Keys as they are; 8-bit floats are widened to the queries' dtype."""
    stored, factor = as_laid_out(k), widening_factor(k)

    def queries(q, pos, tile):
        return q if factor == 1 else q * jnp.asarray(factor, q.dtype)

    def logits(q, pos, tile):
        tile = widened(tile, dtype)
        return product(q.astype(tile.dtype), tile, (1, 1 if stored.axis == 2 else 0))

    return Keys((stored,), logits, queries)


def dense_values(v: jax.Array, dtype) -> Values:
    """Values as they are."""
    stored, factor = as_laid_out(v), widening_factor(v)

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


def _sizes(q, k, v, k_pos) -> Blocks | None:
    K, wide = k.shape[1], q.dtype.itemsize
    # 8-bit floats are widened.
    expanded = sum(x.shape[3] * wide for x in (k, v) if x.dtype.itemsize == 1)
    key = block_sizes.key(
        heads=K, rows=padded_rows(q, K), H=k.shape[3], H_v=v.shape[3], q=q.dtype, k=k.dtype, v=v.dtype
    )
    sizes = sum(map(vmem_bytes, (k, v))) + 4, expanded + logits_bytes(q, K)
    return blocks("decode_attention.mosaic_tpu", key, K, k_pos.shape[2], *sizes, rows=padded_rows(q, K))


def vmem_bytes(x: jax.Array) -> float:
    """Of one slot of one head of `[B, K, S, H]`."""
    width = x.shape[3] if slots_minor(x) else -(-x.shape[3] // 128) * 128
    return width * x.dtype.itemsize


def _unsupported(q, k, v, q_pos, k_pos, bias=None, *, window, scale) -> str | None:
    return row_limit(q, k.shape[1], k_pos.shape[2]) or (
        f"finds no tile of [K, S, H] = {list(k.shape[1:])} that fits" if _sizes(q, k, v, k_pos) is None else None
    )


def _decode_attention(q, k, v, q_pos, k_pos, bias=None, *, window, scale) -> Partial:
    return attend(
        q,
        dense_keys(k, q.dtype),
        dense_values(v, q.dtype),
        q_pos,
        k_pos,
        bias,
        sizes=_sizes(q, k, v, k_pos),
        window=window,
        scale=scale,
    )


kernel = Kernel(_decode_attention, _unsupported)
