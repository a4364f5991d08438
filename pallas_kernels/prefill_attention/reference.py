"""Defines `prefill_attention`: blocks of queries, each over only the keys before its end."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.logits import Scale, capped, factor
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
    scale: Scale | None = None,
) -> Partial:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`."""
    T, H = q.shape[1], q.shape[3]
    q = q * jnp.asarray(factor(scale, H), q.dtype)
    blocks = []
    for start in range(0, T, _BLOCK):
        block = slice(start, min(start + _BLOCK, T))
        older = slice(0 if window is None else max(0, start - window + 1), start)
        blocks.append(_block(q, k, v, pos, block, older, window, scale))
    return Partial(*(jnp.concatenate(parts, axis=1) for parts in zip(*blocks)))


def _block(q, k, v, pos, block: slice, older: slice, window, scale) -> Partial:
    """A block of queries over its own keys and over older ones, with one softmax over both."""
    B, _, N, H = q.shape
    K = k.shape[1]
    qs, q_pos = q[:, block], pos[:, block]
    T = qs.shape[1]
    qs = qs.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    parts = []
    for keys in (older, block) if older.start < older.stop else (block,):
        logits = jnp.einsum("bkgth,bksh->bkgts", qs, k[:, :, keys], preferred_element_type=jnp.float32)
        logits = capped(logits, scale)
        if keys is block or window is not None:
            mask = visible(q_pos, pos[:, keys], window)[:, None, None]  # [B, 1, 1, T, S]
            logits = jnp.where(mask, logits, -jnp.inf)
        # Without a window every query sees all older keys, and a mask would cost a fifth of the time.
        parts.append((logits, v[:, :, keys]))
    m = jnp.max(jnp.stack([jnp.max(logits, axis=-1) for logits, _ in parts]), axis=0)[..., None]
    m = jnp.where(m == -jnp.inf, 0.0, m)
    weights = [(jnp.exp(logits - m), values) for logits, values in parts]
    total = sum(jnp.sum(p, axis=-1, keepdims=True) for p, _ in weights)
    out = sum(
        jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), values, preferred_element_type=jnp.float32)
        for p, values in weights
    )
    real = (q_pos >= 0)[:, None, None, :, None]
    out = jnp.where(real, out / jnp.where(total == 0.0, 1.0, total), 0.0)
    lse = jnp.where(real, m + jnp.log(total), -jnp.inf)[..., 0]
    return Partial(
        out=out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, v.shape[-1]),
        lse=lse.transpose(0, 3, 1, 2).reshape(B, T, N),
    )
