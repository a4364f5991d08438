"""Dense slots on Hopper GPUs. Lowered for CUDA, never run on a GPU.

One warpgroup takes a part of the slots of one KV head. Tiles of keys and values come through TMA into a ring of buffers
in shared memory, and both products run on the tensor cores with queries as rows: `S = Q K^T`, then `O += P V` with P
from registers. wgmma has 64 rows, of which T * G hold queries and the others nothing, so every element of the cache is
multiplied 64 times where T * G would do. The transposed products `S^T = K Q^T` and `O^T = V^T P^T` need only 8 columns,
but P in shared memory and a maximum across warps.

Slots behind the last whole tile, fewer than 64, are left to the reference and merged.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import block_sizes
from pallas_kernels.decode_attention import reference
from pallas_kernels.dispatch import Kernel
from pallas_kernels.partial import Partial, combine

ROWS = 64  # of a wgmma
SLOTS = 64  # of a tile
SHARED_BYTES = 219 * 1024  # of shared memory; a block may use 227 KB, and barriers and reductions take some
_BUFFERS = 4  # tiles in flight at most
PROGRAMS = (264, 132, 528, 1056)
"""Two for each of the 132 multiprocessors of an H100, and what else is worth a try."""
_LOG2E = math.log2(math.e)


def _unsupported(q, k, v, q_pos, k_pos, bias=None, *, window=None, scale=None) -> str | None:
    """Why the kernel cannot run these arguments, or None if it can."""
    del q_pos, bias, window, scale
    H = q.shape[-1]
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"takes bfloat16 queries, keys and values, got {q.dtype}, {k.dtype} and {v.dtype}"
    if H not in (64, 128, 256) or v.shape[-1] != H:
        return f"takes heads of 64, 128 or 256 in q, k and v alike, got {H} and {v.shape[-1]}"
    return row_limit(q, k.shape[1]) or shortage(k_pos)


def row_limit(q: jax.Array, heads: int) -> str | None:
    """Returns why so many queries are unsupported by every decode kernel, or None."""
    rows = q.shape[1] * q.shape[2] // heads
    return None if 0 < rows <= ROWS else f"takes 1 to {ROWS} queries a KV head, got T * G = {rows} of q {list(q.shape)}"


def shortage(k_pos: jax.Array) -> str | None:
    """Returns why so many slots are unsupported, or None: TMA counts them in eights."""
    S = k_pos.shape[-1]
    return f"takes a multiple of 8 slots from {SLOTS} on, got S = {S}" if S < SLOTS or S % 8 else None


def _decode_attention(q, k, v, q_pos, k_pos, bias=None, *, window=None, scale=None) -> Partial:
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    rows, row_pos = as_rows(q, q_pos, K, scale)
    flat = lambda x: None if x is None else x.reshape(B * K, *x.shape[2:])
    partials = attend(rows, T * N // K, flat(k), flat(v), row_pos, flat(k_pos), flat(bias), window=window)
    partials = [by_token(partial, B, T, N) for partial in partials]
    rest = S // SLOTS * SLOTS
    if rest < S:
        of_rest = lambda x: None if x is None else x[:, :, rest:]
        slots = q, of_rest(k), of_rest(v), q_pos, of_rest(k_pos), of_rest(bias)
        partials.append(reference.decode_attention(*slots, window=window, scale=scale))
    return combine(partials)


def attend(rows, used, k, v, row_pos, k_pos, bias=None, row_owner=None, owner=None, *, window) -> list[Partial]:
    """Attention of 64 rows a head over its whole tiles of slots, in parts that are still to be merged.

    Args:
      rows: bf16[heads, 64, H], scaled.
      used: how many of the rows are queries.
      k: bf16[heads, S, H].
      v: bf16[heads, S, H].
      row_pos: i32[heads, 64].
      k_pos: i32[heads, S].
      bias: f32[heads, S] or None.
      row_owner: i32[heads, 64], with `owner`: whose slots a row sees. None: all.
      owner: i32[heads, S].
      window: tokens, or None.

    Returns:
      Parts with `out` f32[heads, used or a few more, H] and `lse` f32[heads, the same].
    """
    heads, H, tiles = k.shape[0], k.shape[2], k.shape[1] // SLOTS
    buffers, splits = _sizes(heads, tiles, H, owned=owner is not None, biased=bias is not None)
    of_rows = [row_pos] + ([] if owner is None else [row_owner])
    of_slots = [k_pos] + ([] if owner is None else [owner]) + ([] if bias is None else [bias.astype(jnp.float32)])
    tiled = dict(transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
    ring = plgpu.SMEM((buffers, SLOTS, H), jnp.bfloat16, **tiled)
    written = -(-used // 8) * 8
    out, lse = plgpu.kernel(
        functools.partial(
            _kernel,
            tiles=tiles,
            splits=splits,
            buffers=buffers,
            window=window,
            owned=owner is not None,
            biased=bias is not None,
        ),
        out_type=[
            jax.ShapeDtypeStruct((splits, heads, written, H), jnp.float32),
            jax.ShapeDtypeStruct((splits, heads, written), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((ROWS, H), jnp.bfloat16, **tiled),
            [plgpu.SMEM((ROWS,), jnp.int32)] * len(of_rows),
            [ring, ring, *(plgpu.SMEM((buffers, SLOTS), x.dtype) for x in of_slots)],
            plgpu.SMEM((ROWS, H), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + len(of_rows)),
            plgpu.Barrier(num_arrivals=2 + len(of_slots), num_barriers=buffers),
        ],
        grid=(splits, heads),
        grid_names=("split", "head"),
    )(rows, *of_rows, k, v, *of_slots)
    return [Partial(out[i], lse[i]) for i in range(splits)]


def as_rows(q: jax.Array, q_pos: jax.Array, K: int, scale: float | None) -> tuple[jax.Array, jax.Array]:
    """Scaled queries [B * K, 64, H] and their positions i32[B * K, 64]; rows beyond T * G are padding."""
    B, T, N, H = q.shape
    G = N // K
    scaled = q.reshape(B, T, K, G, H) * jnp.asarray(H**-0.5 if scale is None else scale, q.dtype)
    rows = scaled.transpose(0, 2, 1, 3, 4).reshape(B * K, T * G, H)
    pos = jnp.broadcast_to(q_pos[:, None, :, None], (B, K, T, G)).reshape(B * K, T * G)
    more = ROWS - T * G
    return jnp.pad(rows, ((0, 0), (0, more), (0, 0))), jnp.pad(pos, ((0, 0), (0, more)), constant_values=-1)


def by_token(rows: Partial, B: int, T: int, N: int) -> Partial:
    """Rows [B * K, T * G or more, ...] as [B, T, N, ...]."""
    K = rows.lse.shape[0] // B
    G = N // K
    turn = lambda x: jnp.moveaxis(x[:, : T * G].reshape(B, K, T, G, *x.shape[2:]), 1, 2).reshape(B, T, N, *x.shape[2:])
    return Partial(turn(rows.out), turn(rows.lse))


def _sizes(heads: int, tiles: int, H: int, *, owned: bool, biased: bool) -> tuple[int, int]:
    """Tiles in flight and parts of a head."""
    fixed, tile = ROWS * H * (2 + 4), SLOTS * (2 * 2 * H + 4 * (1 + owned + biased))  # queries and results; a tile
    room = (SHARED_BYTES - fixed) // tile
    return block_sizes.choose(
        "decode_attention.mosaic_gpu",
        block_sizes.key(H=H, biased=int(biased), pages=int(owned)),
        default=dict(buffers=min(_BUFFERS, room), programs=PROGRAMS[0]),
        candidates=[
            dict(buffers=buffers, programs=programs)
            for buffers in block_sizes.doublings(1, min(2 * _BUFFERS, room))
            for programs in PROGRAMS
        ],
        fit=lambda sizes: (sizes["buffers"], parts(heads, tiles, sizes["programs"])),
    )


def parts(heads: int, tiles: int, programs: int) -> int:
    """Into how many the tiles of a head are cut, so that the heads fill the device."""
    return max(1, min(tiles, programs // heads))


def _kernel(q_ref, *refs, tiles, splits, buffers, window, owned, biased):
    """q_ref bf16[heads, 64, H]; refs: what `attend` has of rows, k, v and what it has of slots; results; scratch."""
    row_refs, refs = refs[: 1 + owned], refs[1 + owned :]
    slot_refs, refs = refs[: 3 + owned + biased], refs[3 + owned + biased :]
    out_ref, lse_ref, q_smem, row_smem, rings, out_smem, lse_smem, ready, filled = refs
    head, split = jax.lax.axis_index("head"), jax.lax.axis_index("split")
    first = jax.lax.div(split * tiles, splits)
    count = jax.lax.div((split + 1) * tiles, splits) - first

    for source, target in zip((q_ref, *row_refs), (q_smem, *row_smem), strict=True):
        plgpu.copy_gmem_to_smem(source.at[head], target, ready)

    def fetch(tile, buffer):
        slots = pl.ds((first + tile) * SLOTS, SLOTS)
        for source, ring in zip(slot_refs, rings, strict=True):
            plgpu.copy_gmem_to_smem(source.at[head, slots], ring.at[buffer], filled.at[buffer])

    for buffer in range(buffers):
        pl.when(buffer < count)(functools.partial(fetch, buffer, buffer))
    plgpu.barrier_wait(ready)
    of_rows, of_columns = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    row_pos, *row_owner = (spread(plgpu.load(x, (), layout=of_rows), 0) for x in row_smem)

    def attend(tile, carry):
        acc, m, total = carry
        buffer = jax.lax.rem(tile, jnp.int32(buffers))
        plgpu.barrier_wait(filled.at[buffer])
        keys, values, *columns = (ring.at[buffer] for ring in rings)

        def logits(ref):
            plgpu.wgmma(ref, q_smem, plgpu.transpose_ref(keys, (1, 0)))
            return ref[...]

        s = pl.run_scoped(logits, plgpu.ACC((ROWS, SLOTS), jnp.float32))
        pos, *columns = (spread(plgpu.load(x, (), layout=of_columns), 1) for x in columns)
        seen = visible_rows(row_pos, pos, window)
        if owned:
            seen &= columns[0] == row_owner[0]
        if biased:
            s += columns[-1]
        p, m, shrink = softmax_step(jnp.where(seen, s, -jnp.inf), m)
        total = total * shrink + jnp.sum(p, axis=1)
        acc = acc * jax.lax.broadcast_in_dim(shrink, acc.shape, (0,))

        def mix(ref):
            plgpu.wgmma(ref, p.astype(jnp.bfloat16), values)

        acc = pl.run_state(mix)(plgpu.ACC.init(acc))
        plgpu.commit_smem()  # all warps have read the buffer before it is filled again
        pl.when(tile + buffers < count)(lambda: fetch(tile + buffers, buffer))
        return acc, m, total

    zeros = lambda shape, layout, fill=0.0: plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)
    start = (
        zeros(out_smem.shape, plgpu.Layout.WGMMA),
        zeros((ROWS,), of_rows, -jnp.inf),
        zeros((ROWS,), of_rows),
    )
    acc, m, total = jax.lax.fori_loop(0, count, attend, start)
    inverse = 1.0 / jnp.where(total == 0.0, 1.0, total)
    out_smem[...] = acc * jax.lax.broadcast_in_dim(inverse, acc.shape, (0,))
    lse_smem[...] = jnp.where(total == 0.0, -jnp.inf, m + jnp.log(jnp.where(total == 0.0, 1.0, total)))
    plgpu.commit_smem()
    written = pl.ds(0, lse_ref.shape[2])
    plgpu.copy_smem_to_gmem(out_smem.at[written], out_ref.at[split, head])
    plgpu.copy_smem_to_gmem(lse_smem.at[written], lse_ref.at[split, head])
    plgpu.wait_smem_to_gmem(0)


def spread(x: jax.Array, axis: int) -> jax.Array:
    """A vector of rows (axis 0) or of columns (axis 1) over the tile of logits."""
    return jax.lax.broadcast_in_dim(x, (ROWS, SLOTS), (axis,))


def visible_rows(row_pos: jax.Array, k_pos: jax.Array, window: int | None) -> jax.Array:
    """`pallas_kernels.visibility.visible` of positions that have been spread."""
    mask = (k_pos >= 0) & (k_pos <= row_pos)
    return mask if window is None else mask & (k_pos > row_pos - window)


def softmax_step(s: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weights, largest logit so far, what earlier sums are multiplied by) of a tile of logits, -inf where hidden."""
    m = jnp.maximum(before, jnp.max(s, axis=1))
    shift = jnp.where(m == -jnp.inf, 0.0, m)
    p = jnp.exp2((s - jax.lax.broadcast_in_dim(shift, s.shape, (0,))) * _LOG2E)
    return p, m, jnp.exp2((before - shift) * _LOG2E)


kernel = Kernel(_decode_attention, _unsupported)
