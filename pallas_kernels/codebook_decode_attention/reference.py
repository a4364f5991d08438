"""Defines `codebook_decode_attention`: tiles of slots are looked up, attended to and merged."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.partial import Partial, fold_tiles
from pallas_kernels.product_quantize.reference import Codes, reconstruct

_TILE = 512  # slots; a float32 tile of 8 heads of 128 channels is 2 MB


def codebook_decode_attention(
    q: jax.Array,
    k: Codes,
    v: Codes,
    key_codebook: jax.Array,
    value_codebook: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """See `pallas_kernels.codebook_decode_attention.api.codebook_decode_attention`."""
    B, T, N, H = q.shape
    S = k_pos.shape[-1]
    if S == 0:
        return Partial(jnp.zeros((B, T, N, H), jnp.float32), jnp.full((B, T, N), -jnp.inf))

    def attend(start, size):
        def rows(x):
            per = S // x.shape[2]  # slots of a word
            return jax.lax.dynamic_slice_in_dim(x, start // per, size // per, axis=2)

        return decode_attention(
            q,
            reconstruct(tuple(map(rows, k)), key_codebook, q.dtype),
            reconstruct(tuple(map(rows, v)), value_codebook, q.dtype),
            q_pos,
            rows(k_pos),
            window=window,
            scale=scale,
        )

    return fold_tiles(attend, S, _TILE)
