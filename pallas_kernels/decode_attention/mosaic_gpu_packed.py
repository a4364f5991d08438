"""Packed slots on Hopper GPUs. Lowered for CUDA, never run on a GPU.

The dense kernel (see `mosaic_gpu_dense`) with one step before each product: 64 slots are restored in registers and put
into shared memory as bfloat16. Which 64 is what makes that simple. Attention does not mind the order of slots, so a
tile is 64 groups of g slots, and a step of it takes one slot of every group: words are rows of a strided copy, keys'
scales per channel are one row a group as they are stored, and nothing is shuffled.

It is written to be right, not fast: every element is unpacked by itself and multiplied with 64 rows, most of them
empty, which by the published peaks of an H100 takes longer than reading 2 bits.

Slots behind the last whole tile, fewer than 64 g, are left to the reference and merged.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import block_sizes
from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.mosaic_gpu_dense import (
    PROGRAMS,
    ROWS,
    SHARED_BYTES,
    SLOTS,
    as_rows,
    by_token,
    parts,
    row_limit,
    softmax_step,
    spread,
    visible_rows,
)
from pallas_kernels.dispatch import Kernel
from pallas_kernels.encoded import cut
from pallas_kernels.partial import Partial, combine
from pallas_kernels.quantize_pack import Packed
from pallas_kernels.words import WORD_BITS

_GROUP = 32  # slots of a group where keys have a scale per token: any number would do
_CHANNELS = 32  # that are restored at a time at least: the width of a swizzled row of `restored`


def _unsupported(q, k: Packed, v: Packed, q_pos, k_pos, bias=None, *, window=None, scale=None) -> str | None:
    """Why the kernel cannot run these arguments, or None if it can."""
    del q_pos, window, scale
    H, S, bits = q.shape[-1], k_pos.shape[-1], k.bits
    if bits == 3:
        return "takes 2, 4 and 8 bits, got 3"
    if v.bits != bits or v.axis != "token":
        return f"takes values of {bits} bits like the keys, packed per token, got {v.bits} per {v.axis}"
    if q.dtype != jnp.bfloat16 or {k.affine.dtype, v.affine.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"takes bfloat16 queries and scales, got {q.dtype} and {k.affine.dtype}"
    if H not in (64, 128) or v.shape[3] != H:
        return f"takes heads of 64 or 128 in q, k and v alike, got {H} and {v.shape[3]}"
    if limit := row_limit(q, k.words.shape[1]):
        return limit
    group = _group(k)
    if group % (WORD_BITS // bits) or group % 8:
        return f"takes groups of whole words and a multiple of 8 tokens, got {group} for {bits} bits"
    if S < SLOTS * group or S % group:
        return f"takes whole groups of {group} slots, {SLOTS} or more, got S = {S}"
    for name, x in [("values", v)] + [("keys", k)] * (k.axis == "token"):
        width = 2 * H // x.affine.shape[2]
        if width % _CHANNELS:
            return f"takes {name} with a scale for a multiple of {_CHANNELS} channels, got {width}"
    if _buffers(k, v, H, bias) == 0:
        return f"holds {SLOTS} groups of slots in shared memory, too much in groups of {group}"
    return None


def _buffers(k: Packed, v: Packed, H: int, bias) -> int:
    """Tiles of words in flight, two if there is room."""
    slots = SLOTS * _group(k)
    of_token = lambda x: 2 * x.affine.shape[2] * slots
    of_keys = 4 * SLOTS * H if k.axis == "channel" else of_token(k)
    fixed = 2 * SLOTS * H + of_keys + of_token(v) + (4 if bias is None else 8) * (slots + SLOTS)
    return min(2, max(0, SHARED_BYTES - fixed) // (2 * 4 * SLOTS * H))


def _group(k: Packed) -> int:
    """Slots of a group."""
    return _GROUP if k.axis == "token" else k.group


def _decode_attention(q, k: Packed, v: Packed, q_pos, k_pos, bias=None, *, window=None, scale=None) -> Partial:
    B, T, N, H = q.shape
    K, S = k_pos.shape[1:]
    group = _group(k)
    rows, row_pos = as_rows(q, q_pos, K, scale)
    tiles = S // (SLOTS * group)
    splits = block_sizes.choose(
        "decode_attention.mosaic_gpu",
        block_sizes.key(H=H, bits=k.bits, key_axis=k.axis, group=group, biased=int(bias is not None)),
        default=dict(programs=PROGRAMS[0]),
        candidates=[dict(programs=programs) for programs in PROGRAMS],
        fit=lambda sizes: parts(B * K, tiles, sizes["programs"]),
    )
    flat = lambda x, *shape: x.reshape(B * K, *shape)
    by_channel = lambda x: flat(x.affine, -1, 2 * H)
    by_group = lambda x, *more: flat(x, *more, S // group, group)
    by_slot = lambda x: by_group(x.affine, x.affine.shape[2])
    words = [flat(x.words, S // group, -1, H) for x in (k, v)]  # one in a row
    keys = by_channel(k) if k.axis == "channel" else by_slot(k)
    per_slot = [by_group(k_pos)] + ([] if bias is None else [by_group(bias.astype(jnp.float32))])
    metadata = [keys, by_slot(v), *per_slot]
    buffers = _buffers(k, v, H, bias)
    # What a tile needs of each: groups are its rows.
    in_tile = lambda x: plgpu.SMEM((*x.shape[1:-2], SLOTS, x.shape[-1]), x.dtype)
    written = -(-T * N // K // 8) * 8  # rows
    restored = dict(transforms=(plgpu.TilingTransform((8, _CHANNELS)), plgpu.SwizzleTransform(2 * _CHANNELS)))
    out, lse = plgpu.kernel(
        functools.partial(
            _kernel,
            tiles=tiles,
            splits=splits,
            buffers=buffers,
            bits=k.bits,
            key_axis=k.axis,
            window=window,
            biased=bias is not None,
        ),
        out_type=[
            jax.ShapeDtypeStruct((splits, B * K, ROWS, H), jnp.float32),
            jax.ShapeDtypeStruct((splits, B * K, written), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((ROWS,), jnp.int32),
            [plgpu.SMEM((buffers, SLOTS, H), jnp.uint32)] * 2,
            list(map(in_tile, metadata)),
            [plgpu.SMEM((SLOTS,), x.dtype) for x in per_slot],
            plgpu.SMEM((SLOTS, H), jnp.bfloat16, **restored),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=len(metadata)),
            plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
        ],
        grid=(splits, B * K),
        grid_names=("split", "head"),
    )(rows, row_pos, *words, *metadata)
    partials = [by_token(Partial(out[i], lse[i]), B, T, N) for i in range(splits)]
    first = tiles * SLOTS * group
    if first < S:
        rest = lambda x: None if x is None else cut(x, first, S - first)
        slots = q, rest(k), rest(v), q_pos, rest(k_pos), rest(bias)
        partials.append(reference.decode_attention(*slots, window=window, scale=scale))
    return combine(partials)


def _kernel(
    q_ref,  # bf16[B * K, 64, H]
    row_pos_ref,  # i32[B * K, 64]
    k_words_ref,  # u32[B * K, S / g, words of a group, H]
    v_words_ref,
    *refs,  # scales and zeros of keys, of values, positions, the bias if there is one; results; scratch
    tiles: int,
    splits: int,
    buffers: int,
    bits: int,
    key_axis: str,
    window: int | None,
    biased: bool,
):
    count_metadata = 4 if biased else 3
    metadata_refs, refs = refs[:count_metadata], refs[count_metadata:]
    out_ref, lse_ref, row_pos_smem, (k_ring, v_ring), metadata, columns, restored, lse_smem, *barriers = refs
    ready, described, filled = barriers
    k_affine, v_affine, *per_slot = metadata
    head, split = jax.lax.axis_index("head"), jax.lax.axis_index("split")
    first = jax.lax.div(split * tiles, splits)
    # A step reads one word of every group of a tile, which holds `per` slots of each.
    steps_of_tile, per = k_words_ref.shape[2], WORD_BITS // bits
    steps = (jax.lax.div((split + 1) * tiles, splits) - first) * steps_of_tile
    of_rows, of_columns = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    plgpu.copy_gmem_to_smem(row_pos_ref.at[head], row_pos_smem, ready)
    plgpu.barrier_wait(ready)
    row_pos = spread(plgpu.load(row_pos_smem, (), layout=of_rows), 0)
    q = plgpu.load(q_ref.at[head], (), layout=plgpu.Layout.WGMMA, optimized=False)

    def groups_of(step):
        return pl.ds((first + jax.lax.div(step, jnp.int32(steps_of_tile))) * SLOTS, SLOTS)

    def fetch(step, buffer):
        word = jax.lax.rem(step, jnp.int32(steps_of_tile))
        for source, ring in ((k_words_ref, k_ring), (v_words_ref, v_ring)):
            plgpu.copy_gmem_to_smem(source.at[head, groups_of(step), word], ring.at[buffer], filled.at[buffer])

    def describe(step):
        for source, target in zip(metadata_refs, metadata, strict=True):
            at = (head, groups_of(step)) if len(source.shape) == 3 else (head, slice(None), groups_of(step))
            plgpu.copy_gmem_to_smem(source.at[at], target, described)
        plgpu.barrier_wait(described)

    def code(words, shift):
        field = (plgpu.load(words, (), layout=plgpu.Layout.WGMMA, optimized=False) >> shift) & jnp.uint32(2**bits - 1)
        return field.astype(jnp.int32).astype(jnp.float32)

    def restore_by_channel(words, shift, affine):
        H = words.shape[1]
        half = lambda first: plgpu.load(
            affine.at[:, pl.ds(first, H)], (), layout=plgpu.Layout.WGMMA, optimized=False
        )
        scale, zero = half(0), half(H)
        x = code(words, shift) * scale.astype(jnp.float32) + zero.astype(jnp.float32)
        restored[...] = x.astype(jnp.bfloat16)

    def restore_by_slot(words, shift, affine, slot):
        n, H = affine.shape[0] // 2, words.shape[1]
        for i in range(n):
            channels = pl.ds(i * (H // n), H // n)
            row = lambda i: jax.lax.broadcast_in_dim(
                plgpu.load(affine.at[i, :, slot], (), layout=of_rows, optimized=False).astype(jnp.float32),
                (SLOTS, H // n),
                (0,),
            )
            x = code(words.at[:, channels], shift) * row(i) + row(n + i)
            restored[:, channels] = x.astype(jnp.bfloat16)

    def attend(step, carry):
        buffer = jax.lax.rem(step, jnp.int32(buffers))
        word = jax.lax.rem(step, jnp.int32(steps_of_tile))
        pl.when(word == 0)(lambda: describe(step))
        plgpu.barrier_wait(filled.at[buffer])
        k_words, v_words = k_ring.at[buffer], v_ring.at[buffer]

        def one_slot_of_each_group(j, carry):
            acc, m, total = carry
            slot, shift = word * per + j, (j * bits).astype(jnp.uint32)
            if key_axis == "channel":
                restore_by_channel(k_words, shift, k_affine)
            else:
                restore_by_slot(k_words, shift, k_affine, slot)
            for source, column in zip(per_slot, columns, strict=True):  # rows become columns
                column[...] = plgpu.load(source.at[:, slot], (), layout=of_rows, optimized=False)
            plgpu.commit_smem()

            def logits(ref):
                plgpu.wgmma(ref, q, plgpu.transpose_ref(restored, (1, 0)))
                return ref[...]

            s = pl.run_scoped(logits, plgpu.ACC((ROWS, SLOTS), jnp.float32))
            pos, *bias = (spread(plgpu.load(column, (), layout=of_columns), 1) for column in columns)
            if biased:
                s += bias[0]
            p, m, shrink = softmax_step(jnp.where(visible_rows(row_pos, pos, window), s, -jnp.inf), m)
            total = total * shrink + jnp.sum(p, axis=1)
            acc = acc * jax.lax.broadcast_in_dim(shrink, acc.shape, (0,))
            plgpu.commit_smem()  # all warps are done with the keys before values take their place
            restore_by_slot(v_words, shift, v_affine, slot)
            plgpu.commit_smem()

            def mix(ref):
                plgpu.wgmma(ref, p.astype(jnp.bfloat16), restored)

            acc = pl.run_state(mix)(plgpu.ACC.init(acc))
            plgpu.commit_smem()
            return acc, m, total

        carry = jax.lax.fori_loop(0, per, one_slot_of_each_group, carry)
        pl.when(step + buffers < steps)(lambda: fetch(step + buffers, buffer))
        return carry

    for buffer in range(buffers):
        pl.when(buffer < steps)(functools.partial(fetch, jnp.int32(buffer), buffer))
    constant = lambda fill, shape, layout: plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)
    start = (
        constant(0.0, out_ref.shape[2:], plgpu.Layout.WGMMA),
        constant(-jnp.inf, (ROWS,), of_rows),
        constant(0.0, (ROWS,), of_rows),
    )
    acc, m, total = jax.lax.fori_loop(0, steps, attend, start)
    inverse = 1.0 / jnp.where(total == 0.0, 1.0, total)
    out_ref[split, head] = acc * jax.lax.broadcast_in_dim(inverse, acc.shape, (0,))
    lse_smem[...] = jnp.where(total == 0.0, -jnp.inf, m + jnp.log(jnp.where(total == 0.0, 1.0, total)))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, lse_ref.shape[2])], lse_ref.at[split, head])
    plgpu.wait_smem_to_gmem(0)


kernel = Kernel(_decode_attention, _unsupported)
