"""Defines `prefill_attention`: blocks of queries, each over only the keys before its end."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.partial import Partial
from pallas_kernels.visibility import visible

_BLOCK = 256  # queries; the logits of one block are f32[B, N, 256, <= T]


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pos: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`."""
    T = q.shape[1]
    blocks = []
    for start in range(0, T, _BLOCK):
        end = min(start + _BLOCK, T)
        first = 0 if window is None else max(0, start - window + 1)
        blocks.append(
            _block(
                q[:, start:end],
                k[:, :, first:end],
                v[:, :, first:end],
                pos[:, start:end],
                pos[:, first:end],
                window,
                scale,
            )
        )
    return Partial(*(jnp.concatenate(parts, axis=1) for parts in zip(*blocks)))


def _block(q, k, v, q_pos, k_pos, window, scale) -> Partial:
    B, T, N, H = q.shape
    K = k.shape[1]
    G = N // K
    scale = H**-0.5 if scale is None else scale
    qs = (q.reshape(B, T, K, G, H) * jnp.asarray(scale, q.dtype)).transpose(0, 2, 3, 1, 4)
    logits = jnp.einsum("bkgth,bksh->bkgts", qs, k, preferred_element_type=jnp.float32)
    mask = visible(q_pos, k_pos, window)[:, None, None]  # [B, 1, 1, T, S]
    logits = jnp.where(mask, logits, -jnp.inf)
    m = jnp.max(logits, axis=-1, keepdims=True)
    m = jnp.where(m == -jnp.inf, 0.0, m)
    p = jnp.exp(logits - m)
    total = jnp.sum(p, axis=-1, keepdims=True)
    out = jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.where(total == 0.0, 1.0, total)
    lse = (m + jnp.log(total))[..., 0]
    return Partial(
        out=out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, v.shape[-1]),
        lse=lse.transpose(0, 3, 1, 2).reshape(B, T, N),
    )
