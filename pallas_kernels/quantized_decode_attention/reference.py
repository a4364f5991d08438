"""Defines `quantized_decode_attention`: tiles of slots are dequantized, attended to and merged."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.partial import Partial, fold_tiles
from pallas_kernels.quantize_pack.reference import Packed, dequantize

_TILE = 512  # slots; a float32 tile of 8 heads of 128 channels is 2 MB


def quantized_decode_attention(
    q: jax.Array,
    k: Packed,
    v: Packed | None,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    *,
    bits: int,
    key_axis: str = "channel",
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """See `pallas_kernels.quantized_decode_attention.api.quantized_decode_attention`."""
    B, T, N, H = q.shape
    S = k_pos.shape[-1]
    if S == 0:
        width = (v or k).channels(bits, S)
        return Partial(jnp.zeros((B, T, N, width), jnp.float32), jnp.full((B, T, N), -jnp.inf))
    group = S // k.affine.shape[2] if key_axis == "channel" else 1
    step = math.lcm(group, *(S // x.words.shape[2] for x in (k, v or k)))  # whole groups and whole rows of words

    def attend(start, size):
        def rows(x, first, count):
            return jax.lax.dynamic_slice_in_dim(x, first, count, axis=2)

        def packed_tile(x: Packed, axis) -> Packed:
            in_row = S // x.words.shape[2]
            words = rows(x.words, start // in_row, size // in_row)
            if axis == "channel":
                return Packed(words, rows(x.affine, start // group, size // group))
            return Packed(words, jax.lax.dynamic_slice_in_dim(x.affine, start, size, axis=3))

        keys = dequantize(packed_tile(k, key_axis), bits=bits, axis=key_axis, dtype=q.dtype)
        return decode_attention(
            q,
            keys,
            keys if v is None else dequantize(packed_tile(v, "token"), bits=bits, axis="token", dtype=q.dtype),
            q_pos,
            rows(k_pos, start, size),
            bias=None if bias is None else rows(bias, start, size),
            window=window,
            scale=scale,
        )

    return fold_tiles(attend, S, max(_TILE // step, 1) * step)
