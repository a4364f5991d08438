"""`quantize_pack` for TPU: a tile of slots is read once, and leaves as words, scales and zeros."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sizes
from pallas_kernels.dispatch import Kernel, result_like
from pallas_kernels.quantize_pack.reference import Packed, affine, nearest_code
from pallas_kernels.tpu_tiles import LANES, SUBLANES, slots_minor
from pallas_kernels.words import WORD_BITS

_SLOTS = 512  # of a tile at least, unless there are fewer
_BYTES = 2**20  # of float32 in a tile at most; a tile is held several times while it is worked on


def _unsupported(x, valid, *, bits, group, axis, scale_dtype, clip=1.0, in_row=1) -> str | None:
    """Why the kernel cannot run these arguments, or None if it can."""
    del valid, clip
    if bits == 3:
        return "takes 2, 4 and 8 bits, got 3"
    if 0 in x.shape:
        return f"takes at least one slot, got x {x.shape}"
    if x.dtype not in (jnp.float32, jnp.bfloat16) or jnp.dtype(scale_dtype) not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, got x {x.dtype} and scale_dtype {jnp.dtype(scale_dtype)}"
    S, H = x.shape[2:]
    if H not in (64, 128, 256):
        return f"takes heads of 64, 128 or 256, got {H}"
    if group % SUBLANES:
        return f"takes groups of a multiple of {SUBLANES}, got {group}"
    if in_row * H > LANES and in_row > 1:
        return f"takes rows of up to {LANES} channels, got {in_row} words of {H}"
    slots = min(S, _tile(bits, group, axis))
    if slots * H * 4 > _BYTES:
        return f"holds {slots} slots of {H} channels at a time for groups of {group}, more than {_BYTES} bytes"
    return None


def _quantize_pack(x, valid, *, bits, group, axis, scale_dtype, clip=1.0, in_row=1) -> Packed:
    """See `pallas_kernels.quantize_pack.api.quantize_pack`.

    The grid is (B, K, tiles of slots). Groups lie along sublanes while their extremes are sought: of a tile [s, H] for
    "channel", of its transpose for "token". The steps from extremes to codes are the reference's own functions.
    """
    B, K, S, H = x.shape
    slots = block_sizes.choose(
        "quantize_pack.mosaic_tpu",
        block_sizes.key(heads=K, H=H, bits=bits, axis=axis, group=group, x=x.dtype, scale=jnp.dtype(scale_dtype)),
        default=dict(slots=_tile(bits, group, axis)),
        candidates=[dict(slots=n) for n in block_sizes.doublings(_whole(bits, group, axis), 8 * _SLOTS)],
        fit=lambda sizes: min(sizes["slots"], S),
    )
    whole = lambda b, h, s: (b, h, s, 0)
    minor = lambda b, h, s: (b, h, 0, s)
    transposed = slots_minor(x)  # what XLA:TPU chooses, and what would be copied if it were read otherwise
    if transposed:
        x, of_x = x.swapaxes(2, 3), pl.BlockSpec((1, 1, H, slots), minor)
    else:
        of_x = pl.BlockSpec((1, 1, slots, H), whole)
    if axis == "channel":
        affine, of_affine = (B, K, S // group, 2 * H), pl.BlockSpec((1, 1, slots // group, 2 * H), whole)
    else:
        affine, of_affine = (B, K, 2 * H // group, S), pl.BlockSpec((1, 1, 2 * H // group, slots), minor)
    in_words = WORD_BITS // bits * in_row  # slots of a row of words
    words, affine = pl.pallas_call(
        functools.partial(
            _kernel, bits=bits, group=group, axis=axis, clip=clip, transposed=transposed
        ),
        grid=(B, K, pl.cdiv(S, slots)),
        in_specs=[of_x, pl.BlockSpec((1, K, slots), lambda b, h, s: (b, 0, s))],
        out_specs=[pl.BlockSpec((1, 1, slots // in_words, in_row * H), whole), of_affine],
        out_shape=[
            result_like((B, K, S // in_words, in_row * H), jnp.uint32, x, valid),
            result_like(affine, scale_dtype, x, valid),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        name="quantize_pack",
    )(x, valid.astype(jnp.int32))
    return Packed(words, affine, bits, axis)


def _tile(bits: int, group: int, axis: str) -> int:
    """Slots of a tile, unless there are fewer."""
    whole = _whole(bits, group, axis)
    return -(-_SLOTS // whole) * whole


def _whole(bits: int, group: int, axis: str) -> int:
    """Slots of whole lanes, and of whole sublanes of words, even two in a row, and of scales."""
    return math.lcm(LANES, 2 * SUBLANES * WORD_BITS // bits, SUBLANES * group if axis == "channel" else 1)


def _kernel(
    x_ref,  # [1, 1, s, H], or [1, 1, H, s]
    valid_ref,  # i32[1, K, s]
    words_ref,  # u32[1, 1, s * bits / 32 / n, n * H], n words in a row
    affine_ref,  # [1, 1, s / group, 2 * H], or [1, 1, 2 * H / group, s]
    *,
    bits: int,
    group: int,
    axis: str,
    clip: float,
    transposed: bool,
):
    x = x_ref[0, 0].astype(jnp.float32)
    occupied = valid_ref[0, pl.ds(pl.program_id(1), 1)]  # [1, s]
    by_channel = axis == "channel"
    if transposed == by_channel:
        x = x.T
    if by_channel:
        occupied = occupied.reshape(-1, 1)
    mask = jnp.broadcast_to(occupied, x.shape).reshape(-1, group, x.shape[1]) != 0
    grouped = x.reshape(mask.shape)  # groups along axis 1
    lo = jnp.min(jnp.where(mask, grouped, math.inf), axis=1)
    hi = jnp.max(jnp.where(mask, grouped, -math.inf), axis=1)
    scale, zero = affine(lo, hi, bits=bits, scale_dtype=affine_ref.dtype, clip=clip)
    # float32 before they are put together or an axis is inserted: a bfloat16 tile holds two rows in a word.
    scale, zero = scale.astype(jnp.float32), zero.astype(jnp.float32)
    affine_ref[0, 0] = jnp.concatenate([scale, zero], axis=1 if by_channel else 0).astype(affine_ref.dtype)
    code = nearest_code(grouped, scale[:, None], zero[:, None], bits)
    code = jnp.where(mask, code.astype(jnp.int32), 0).reshape(x.shape)
    code = code if by_channel else code.T  # [s, H]
    per, in_row = WORD_BITS // bits, words_ref.shape[3] // code.shape[1]
    fields = code.reshape(-1, in_row * per, code.shape[1])
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, in_row * per, 1), 1)
    fields = fields << jax.lax.rem(slot, jnp.int32(per)) * bits
    # Fields do not overlap: the sum is their union, the sign bit included.
    word = lambda i: jnp.sum(jnp.where((slot >= i * per) & (slot < (i + 1) * per), fields, 0), axis=1)
    words = jnp.concatenate([word(i) for i in range(in_row)], axis=1) if in_row > 1 else jnp.sum(fields, axis=1)
    words_ref[0, 0] = words.astype(jnp.uint32)


kernel = Kernel(_quantize_pack, _unsupported)
