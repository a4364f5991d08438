"""`block_attention` for TPU: a block of queries fetches the blocks of keys that its table names.

The table of a block of queries lies in scalar memory, and the kernel copies the blocks it names from HBM itself, a few
at a time and ahead of their products. So it turns as often as there are blocks, not as often as there could be, and
tables of any size fit: those of all queries at once, which a prefetched grid would want, do not at 128K tokens.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Kernel, result_like
from pallas_kernels.partial import Partial
from pallas_kernels.tpu_decode import product
from pallas_kernels.tpu_tiles import LANES
from pallas_kernels.visibility import visible

_AT_ONCE = 4  # blocks of keys that a turn reads
_POSITION_BYTES = 2**22  # of all positions of a row, which lie in VMEM
_TABLE_BYTES = 2**17  # of a block of queries in scalar memory, twice


def _unsupported(q, k, v, pos, index, *, block, window=None, scale=None) -> str | None:
    """Why the kernel cannot run these arguments, or None if it can."""
    del window, scale
    if 0 in q.shape or 0 in index.shape:
        return f"takes at least one query and one block, got q {q.shape} and index {index.shape}"
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v all float32 or all bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}"
    H = q.shape[-1]
    if H not in (128, 256) or v.shape[-1] != H:
        return f"takes heads of 128 or 256 in q, k and v alike, got {H} and {v.shape[-1]}"
    if block % LANES or block > 4 * LANES:
        return f"takes blocks of {LANES}, {2 * LANES}, ... {4 * LANES} tokens, got {block}"
    if 4 * pos.shape[1] > _POSITION_BYTES:
        return f"holds the positions of a row in VMEM, too many of {pos.shape[1]} tokens"
    if 4 * index.shape[3] > _TABLE_BYTES:
        return f"holds {index.shape[3]} blocks in scalar memory, too many"
    return None


def _block_attention(q, k, v, pos, index, *, block, window=None, scale=None) -> Partial:
    """See `pallas_kernels.block_attention.api.block_attention`; the grid is (B, heads, blocks of queries)."""
    B, T, N, H = q.shape
    count, most = index.shape[2:]
    filled = -(-most // _AT_ONCE) * _AT_ONCE
    index = jnp.pad(index, ((0, 0), (0, 0), (0, 0), (0, filled - most)), constant_values=-1)
    table = jnp.concatenate([jnp.sum(index >= 0, axis=-1, keepdims=True), jnp.minimum(index, count - 1)], axis=-1)
    of_queries = pl.BlockSpec((1, block, H), lambda b, n, i: (b, i, n))  # as a decoder has them
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    body = functools.partial(
        _kernel, block=block, group=N // k.shape[1], window=window, scale=H**-0.5 if scale is None else scale
    )
    out, lse = pl.pallas_call(
        body,
        grid=(B, N, count),
        in_specs=[
            pl.BlockSpec((1, 1, 1 + filled), lambda b, n, i: ((b * N + n) * count + i, 0, 0), memory_space=pltpu.SMEM),
            of_queries,
            pl.BlockSpec((1, 1, T), lambda b, n, i: (b, 0, 0)),
            anywhere,
            anywhere,
        ],
        out_specs=[of_queries, pl.BlockSpec((1, 1, block), lambda b, n, i: (b * N + n, 0, i))],
        out_shape=[
            result_like((B, T, N * H), jnp.float32, q, k, v, pos, index),
            result_like((B * N, 1, T), jnp.float32, q, k, v, pos, index),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, _AT_ONCE * block, H), k.dtype),
            pltpu.VMEM((2, _AT_ONCE * block, H), v.dtype),
            pltpu.SemaphoreType.DMA((2, 2, _AT_ONCE)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        name="block_attention",
    )(table.reshape(-1, 1, 1 + filled).astype(jnp.int32), q.reshape(B, T, N * H), pos[:, None], k, v)
    return Partial(out.reshape(B, T, N, H), lse.reshape(B, N, T).swapaxes(1, 2))


def _kernel(
    table_ref,  # i32[1, 1, 1 + P] in SMEM: how many blocks, and which
    q_ref,  # [1, t, H]
    pos_ref,  # i32[1, 1, T]
    k_ref,  # [B, K, T, H] in HBM
    v_ref,  # as k_ref
    out_ref,  # f32[1, t, H]
    lse_ref,  # f32[1, 1, t]
    k_tile,  # [2, n * t, H]
    v_tile,  # as k_tile
    done,  # semaphores [2, 2, n]
    *,
    block: int,
    group: int,
    window: int | None,
    scale: float,
):
    # Asked for out here: inside a loop the interpreter does not know the grid.
    b, n, i = (pl.program_id(axis) for axis in range(3))
    head = jax.lax.div(n, jnp.int32(group))
    turns = jax.lax.div(table_ref[0, 0, 0] + (_AT_ONCE - 1), jnp.int32(_AT_ONCE))
    start = lambda block_of: pl.multiple_of(jnp.maximum(block_of, 0) * block, block)
    named = lambda turn, r: table_ref[0, 0, 1 + turn * _AT_ONCE + r]

    def copies(turn, slot):
        for r in range(_AT_ONCE):
            here = pl.ds(start(named(turn, r)), block)
            for which, (ref, tile) in enumerate(((k_ref, k_tile), (v_ref, v_tile))):
                to = tile.at[slot, pl.ds(r * block, block)]
                yield pltpu.make_async_copy(ref.at[b, head, here], to, done.at[slot, which, r])

    @pl.when(turns > 0)
    def _():
        for copy in copies(0, 0):
            copy.start()

    q = q_ref[0] * jnp.asarray(scale, q_ref.dtype)
    q_pos = pos_ref[0, 0, pl.ds(start(i), block)]

    def body(turn, carry):
        m, total, mixed = carry
        slot = jax.lax.rem(turn, jnp.int32(2))

        @pl.when(turn + 1 < turns)
        def _():
            for copy in copies(turn + 1, 1 - slot):
                copy.start()

        for copy in copies(turn, slot):
            copy.wait()
        positions = []
        for r in range(_AT_ONCE):
            at = named(turn, r)
            positions.append(jnp.where(at >= 0, pos_ref[0, :, pl.ds(start(at), block)], -1))
        mask = visible(q_pos, jnp.concatenate(positions, axis=1)[0], window)  # [t, n * t]
        logits = jnp.where(mask, product(q, k_tile[slot], (1, 1)), -math.inf)
        largest = jnp.maximum(m, jnp.max(logits, axis=1, keepdims=True))
        base = jnp.where(largest == -math.inf, 0.0, largest)
        p = jnp.exp(logits - base)
        shrink = jnp.exp(m - base)
        v = v_tile[slot]
        return (
            largest,
            shrink * total + jnp.sum(p, axis=1, keepdims=True),
            shrink * mixed + product(p.astype(v.dtype), v, (1, 0)),
        )

    column = lambda value: jnp.full((block, 1), value, jnp.float32)
    begin = column(-math.inf), column(0.0), jnp.zeros((block, q.shape[1]), jnp.float32)
    m, total, mixed = jax.lax.fori_loop(0, turns, body, begin)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out_ref[0] = mixed / total
    lse_ref[0] = jnp.where(empty, -math.inf, m + jnp.log(total)).T


kernel = Kernel(_block_attention, _unsupported)
