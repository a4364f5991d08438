"""Defines `lowrank_decode_attention`: tiles of slots are expanded, rotated, attended to and merged."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.partial import Partial, fold_tiles
from pallas_kernels.rotary import rotate

_TILE = 512  # slots that are expanded at a time
_ROTATED = 4096  # slots that are rotated at a time where there is nothing to expand: cosines are cheaper in bulk


def lowrank_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    basis: jax.Array | None,
    inv_freq: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    mean: jax.Array | None = None,
    bias: jax.Array | None = None,
    at: jax.Array | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """See `pallas_kernels.lowrank_decode_attention.api.lowrank_decode_attention`."""
    K = k.shape[1] if basis is None else basis.shape[1]

    def attend(start, size):
        tile = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)
        pos = tile(k_pos)
        pos = jnp.broadcast_to(pos, (pos.shape[0], K, size))
        keys = tile(k).astype(q.dtype)
        if basis is not None:
            keys = jnp.matmul(keys, basis.swapaxes(2, 3).astype(q.dtype))
        if mean is not None:
            keys = keys + mean[:, None].astype(keys.dtype)
        values = tile(v).astype(q.dtype)
        values = jnp.broadcast_to(values, (*pos.shape, values.shape[-1]))
        extra = None if bias is None else tile(bias)
        keys = rotate(keys, pos if at is None else tile(at), inv_freq)
        return decode_attention(q, keys, values, q_pos, pos, extra, window=window, scale=scale)

    return fold_tiles(attend, k_pos.shape[2], _ROTATED if basis is None else _TILE)
