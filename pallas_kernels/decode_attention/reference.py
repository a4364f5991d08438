"""Defines `decode_attention`, written so that XLA makes good code of it on CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.logits import Scale, capped, factor
from pallas_kernels.partial import Partial, fold_tiles
from pallas_kernels.visibility import visible

_TILE = 512  # slots of 8-bit floats that are widened at a time
_LOGITS = 2**24  # held at a time: 64 MB


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    *,
    window: int | None = None,
    scale: Scale | None = None,
) -> Partial:
    """See `pallas_kernels.decode_attention.api.decode_attention`."""
    B, T, N, H = q.shape
    K, S = k.shape[1], k.shape[2]
    narrow = k.dtype.itemsize == 1
    tile = max(_LOGITS // (B * T * N) // _TILE, 1) * _TILE
    if narrow or S > tile:
        tile = _TILE if narrow else tile
        return _tiled(q, k, v, q_pos, k_pos, bias, tile=tile, window=window, scale=scale)
    G = N // K
    qs = (q.reshape(B, T, K, G, H) * jnp.asarray(factor(scale, H), q.dtype)).transpose(0, 2, 1, 3, 4)
    qs = qs.reshape(B, K, T * G, H).astype(k.dtype)
    # For one token slots lead the product: XLA's CPU backend runs [S, H] @ [H, G] up to 1.7 times faster than
    # [G, H] @ [H, S]. The softmax wants slots minor, or its loops do not vectorise (experiments/bench_decode.py).
    if T == 1:
        logits = jnp.einsum("bksh,bkrh->bksr", k, qs, preferred_element_type=jnp.float32).swapaxes(-1, -2)
    else:
        logits = jnp.einsum("bkrh,bksh->bkrs", qs, k, preferred_element_type=jnp.float32)
    logits = capped(logits.reshape(B, K, T, G, S), scale)
    if bias is not None:
        logits += bias.astype(jnp.float32)[:, :, None, None]
    mask = visible(q_pos[:, None], k_pos, window)[:, :, :, None]  # [B, K, T, 1, S]
    logits = jnp.where(mask, logits, -jnp.inf)
    m = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    m = jnp.where(m == -jnp.inf, 0.0, m)
    p = jnp.exp(logits - m)
    total = jnp.sum(p, axis=-1)  # [B, K, T, G]
    out = jnp.einsum(
        "bkrs,bksh->bkrh",
        p.reshape(B, K, T * G, S).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    ).reshape(B, K, T, G, v.shape[-1])
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    lse = m[..., 0] + jnp.log(total)
    return Partial(
        out=out.transpose(0, 2, 1, 3, 4).reshape(B, T, N, v.shape[-1]),
        lse=lse.transpose(0, 2, 1, 3).reshape(B, T, N),
    )


def _tiled(q, k, v, q_pos, k_pos, bias, *, tile: int, **how) -> Partial:
    """Some slots at a time: 8-bit floats in the queries' dtype, or chunks of queries with long caches."""

    def attend(start, size):
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)
        wide = lambda x: part(x).astype(q.dtype) if x.dtype.itemsize == 1 else part(x)
        bias_part = None if bias is None else part(bias)
        return decode_attention(q, wide(k), wide(v), q_pos, part(k_pos), bias=bias_part, **how)

    return fold_tiles(attend, k.shape[2], tile)
