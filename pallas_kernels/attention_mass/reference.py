"""Defines `attention_mass`: one more pass over the keys, by blocks of queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.logits import Scale, capped, factor
from pallas_kernels.visibility import visible

_BLOCK = 256  # queries


def attention_mass(
    q: jax.Array,
    k: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    lse: jax.Array,
    bias: jax.Array | None = None,
    *,
    window: int | None = None,
    scale: Scale | None = None,
    reduce: str = "sum",
) -> jax.Array:
    """See `pallas_kernels.attention_mass.api.attention_mass`."""
    B, T, N, H = q.shape
    K, S = k.shape[1], k.shape[2]
    G = N // K
    k = k.astype(q.dtype) if k.dtype.itemsize == 1 else k

    def block(q, q_pos, lse):
        t = q.shape[1]
        qs = (q.reshape(B, t, K, G, H) * jnp.asarray(factor(scale, H), q.dtype)).transpose(0, 2, 3, 1, 4)
        logits = jnp.einsum(
            "bkgth,bksh->bkgts", qs.astype(k.dtype), k, preferred_element_type=jnp.float32
        )
        logits = capped(logits, scale)
        if bias is not None:
            logits += bias.astype(jnp.float32)[:, :, None, None]
        total = lse.reshape(B, t, K, G).transpose(0, 2, 3, 1)[..., None]
        total = jnp.where(total == -jnp.inf, 0.0, total)
        mask = visible(q_pos[:, None], k_pos, window)[:, :, None]  # [B, K, 1, t, S]
        # Masked before exp: a hidden slot's logit may exceed the lse by enough to overflow.
        log_p = jnp.where(mask, logits - total, -jnp.inf)
        p = jnp.exp(log_p)
        if reduce == "max":
            return jnp.max(p, axis=3).reshape(B, N, S)
        if reduce == "squares":
            p = p * p
        elif reduce == "entropy":
            p = jnp.where(mask, -p * log_p, 0.0)
        return jnp.sum(p, axis=3).reshape(B, N, S)

    if T <= _BLOCK:
        return block(q, q_pos, lse)
    pad = -T % _BLOCK
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q_pos = jnp.pad(q_pos, ((0, 0), (0, pad)), constant_values=-1)
    lse = jnp.pad(lse, ((0, 0), (0, pad), (0, 0)))

    merge = jnp.maximum if reduce == "max" else jnp.add

    def body(i, mass):
        part = [jax.lax.dynamic_slice_in_dim(x, i * _BLOCK, _BLOCK, axis=1) for x in (q, q_pos, lse)]
        return merge(mass, block(*part))

    return jax.lax.fori_loop(0, (T + pad) // _BLOCK, body, jnp.zeros((B, N, S), jnp.float32))
