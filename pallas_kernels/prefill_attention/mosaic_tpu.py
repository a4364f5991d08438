"""`prefill_attention` for TPU: flash attention by positions, in the layouts that a decoder has.

Why not the kernels in `jax.experimental.pallas.ops.tpu`: `flash_attention` has neither grouped queries nor an lse that
callers can ask for. `splash_attention` has both, and windows, but masks by index where here positions and padding
decide, wants lengths that are multiples of its blocks, rounds `out` to the queries' dtype before it could be merged
with the cache's part, and writes the lse 128 times, as f32[N, T, 128].
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sizes
from pallas_kernels.dispatch import Kernel, result_like
from pallas_kernels.partial import Partial
from pallas_kernels.tpu_decode import product
from pallas_kernels.tpu_tiles import LANES, kv_heads_per_block, slots_minor
from pallas_kernels.visibility import visible

_QUERIES, _KEYS = 256, 512  # of a tile at most
_QUERY_BYTES = 2**23  # of queries and results in VMEM, twice each; every generation has 16 MB
_KEY_BYTES = 2**20  # of a tile of keys, and of values; Pallas holds two of each


def _unsupported(q, k, v, pos, *, window=None, scale=None) -> str | None:
    """Why the kernel cannot run these arguments, or None if it can."""
    del pos, window, scale
    if 0 in q.shape:
        return f"takes at least one query, got q {q.shape}"
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v all float32 or all bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}"
    H = q.shape[-1]
    if H not in (64, 128, 256) or v.shape[-1] != H:
        return f"takes heads of 64, 128 or 256 in q, k and v alike, got {H} and {v.shape[-1]}"
    heads = kv_heads_per_block(k.shape[1], q.shape[2] // k.shape[1], H)
    if min(_tile(q.shape[2] // k.shape[1], heads, H, q.dtype.itemsize)) < LANES:
        return f"holds {heads} of the {k.shape[1]} KV heads and their queries at a time, too many for VMEM"
    return None


def _prefill_attention(q, k, v, pos, *, window=None, scale=None) -> Partial:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`.

    The grid is (B, KV heads, tiles of queries, tiles of keys), the last axis in order. Positions increase along T, so
    tiles of keys behind a tile of queries, or before its window, are neither computed nor copied. Queries and results
    are read and written as [B, T, N * H], a few KV heads at a time so that blocks are whole lanes.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    G = N // K
    heads = kv_heads_per_block(K, G, H)
    queries, keys = block_sizes.choose(
        "prefill_attention.mosaic_tpu",
        block_sizes.key(heads=K, group=G, H=H, dtype=q.dtype),
        default=dict(zip(("queries", "keys"), _tile(G, heads, H, q.dtype.itemsize))),
        candidates=[
            dict(queries=queries, keys=keys)
            for queries in block_sizes.doublings(LANES, 2 * _QUERIES)
            for keys in block_sizes.doublings(LANES, 4 * _KEYS)
        ],
        fit=lambda sizes: (min(sizes["queries"], T), min(sizes["keys"], T)),
    )
    tiles = functools.partial(_tiles, queries=queries, keys=keys, window=window)

    def read(i, j):
        first, last = tiles(i)
        return jnp.clip(j, first, jnp.minimum(last, pl.cdiv(T, keys) - 1))

    of_queries = pl.BlockSpec((1, queries, heads * G * H), lambda b, h, i, j: (b, i, h))
    slots_last = slots_minor(k)  # what XLA:TPU chooses, and what would be copied if it were read otherwise
    if slots_last:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
        of_keys = pl.BlockSpec((1, heads, H, keys), lambda b, h, i, j: (b, h, 0, read(i, j)))
    else:
        of_keys = pl.BlockSpec((1, heads, keys, H), lambda b, h, i, j: (b, h, read(i, j), 0))
    body = functools.partial(
        _kernel,
        tiles=tiles,
        total=T,
        group=G,
        heads=heads,
        head_dim=H,
        slots_last=slots_last,
        window=window,
        scale=H**-0.5 if scale is None else scale,
    )
    out, lse = pl.pallas_call(
        body,
        grid=(B, K // heads, pl.cdiv(T, queries), pl.cdiv(T, keys)),
        in_specs=[
            of_queries,
            of_keys,
            of_keys,
            pl.BlockSpec((1, 1, queries), lambda b, h, i, j: (b, 0, i)),
            pl.BlockSpec((1, 1, keys), lambda b, h, i, j: (b, 0, read(i, j))),
        ],
        out_specs=[of_queries, pl.BlockSpec((1, heads * G, queries), lambda b, h, i, j: (b, h, i))],
        out_shape=[
            result_like((B, T, N * H), jnp.float32, q, k, v, pos),
            result_like((B, N, T), jnp.float32, q, k, v, pos),
        ],
        scratch_shapes=[pltpu.VMEM((heads * G, queries, LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        name="prefill_attention",
    )(q.reshape(B, T, N * H), k, v, pos[:, None], pos[:, None])
    return Partial(out.reshape(B, T, N, H), lse.swapaxes(1, 2))


def _tile(G: int, heads: int, H: int, itemsize: int) -> tuple[int, int]:
    """Queries and keys of a tile by the size of VMEM; fewer than a lane's 128 mean that it does not fit."""
    queries, keys = _QUERIES, _KEYS
    while queries * heads * G * H * 2 * (itemsize + 4) > _QUERY_BYTES:
        queries //= 2
    while keys * heads * H * itemsize > _KEY_BYTES:
        keys //= 2
    return queries, keys


def _tiles(i, *, queries: int, keys: int, window: int | None):
    """The first and the last tile of keys that tile `i` of the queries may see."""
    tile = lambda slot: jax.lax.div(slot, jnp.int32(keys))  # `//` would ask for the device while lowering
    first = 0 if window is None else tile(jnp.maximum(i * queries - window + 1, 0))
    return first, tile((i + 1) * queries - 1)


def _kernel(
    q_ref,  # [1, t, heads * G * H]
    k_ref,  # [1, heads, s, H], or [1, heads, H, s]
    v_ref,  # as k_ref
    q_pos_ref,  # i32[1, 1, t]
    k_pos_ref,  # i32[1, 1, s]
    out_ref,  # f32[1, t, heads * G * H]: the sum of weighted values, normalised at the end
    lse_ref,  # f32[1, heads * G, t]
    m_ref,  # f32[heads * G, t, 128] scratch: the largest logit so far, in every lane, where it is asked for
    total_ref,  # f32[heads * G, t, 128] scratch: the sum of the weights, alike
    *,
    tiles,
    total: int,
    group: int,
    heads: int,
    head_dim: int,
    slots_last: bool,
    window: int | None,
    scale: float,
):
    j = pl.program_id(3)
    keys = k_pos_ref.shape[-1]
    of_head = lambda n: slice(n * head_dim, (n + 1) * head_dim)
    slots, channels = (1, 0) if slots_last else (0, 1)  # axes of a head's keys and values

    @pl.when(j == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        m_ref[...] = jnp.full_like(m_ref, -math.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    first, last = tiles(pl.program_id(2))
    q_pos, k_pos = q_pos_ref[0], k_pos_ref[0]  # [1, t], [1, s]

    @pl.when((j >= first) & (j <= last) & (jnp.max(q_pos) >= 0))
    def _():
        inside = None
        if total % keys:  # what lies behind the last key is anything
            inside = lambda shape, axis: j * keys + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < total
        own_pos = k_pos if inside is None else jnp.where(inside(k_pos.shape, 1), k_pos, -1)
        mask = visible(q_pos[0], own_pos[0], window)  # [t, s]
        for h in range(heads):
            k, v = k_ref[0, h], v_ref[0, h]
            if inside is not None:  # a weight of zero does not remove a NaN
                v = jnp.where(inside(v.shape, slots), v, jnp.zeros_like(v))
            for n in range(h * group, (h + 1) * group):
                q = q_ref[0, :, of_head(n)]
                q = q * jnp.asarray(scale, q.dtype)
                logits = product(q, k, (1, channels))
                logits = jnp.where(mask, logits, -math.inf)
                before = m_ref[n]
                m = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
                m_ref[n] = m
                m = jnp.where(m == -math.inf, 0.0, m)
                p = jnp.exp(logits - _wide(m, keys))
                shrink = jnp.exp(before - m)
                total_ref[n] = shrink * total_ref[n] + jnp.sum(p, axis=1, keepdims=True)
                mixed = product(p.astype(v.dtype), v, (1, slots))
                out_ref[0, :, of_head(n)] = _wide(shrink, head_dim) * out_ref[0, :, of_head(n)] + mixed

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for n in range(heads * group):
            weights = total_ref[n]
            empty = weights == 0.0
            weights = jnp.where(empty, 1.0, weights)
            out_ref[0, :, of_head(n)] = out_ref[0, :, of_head(n)] * _wide(1.0 / weights, head_dim)
            lse_ref[0, n : n + 1] = jnp.where(empty, -math.inf, m_ref[n] + jnp.log(weights)).T[:1]


def _wide(x: jax.Array, width: int) -> jax.Array:
    """[t, 128] of equal lanes -> [t, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1) if width % LANES == 0 else x[:, :1]


kernel = Kernel(_prefill_attention, _unsupported)
