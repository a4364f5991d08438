"""Accumulated attention with a temperature and noise: what a slot would receive if queries were a little different."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.observation import ALL, LayerObservation, Needs
from kvjax.segments.dense import DenseSegment
from kvjax.transforms.evict import Scorer
from pallas_kernels.logits import capped, factor

_BLOCK = 64  # queries whose logits exist at a time


def gumbel_attention(temperature: float = 1.0, growth: float = 0.01, noise: float = 1.0, seed: int = 0) -> Scorer:
    """All the tempered, perturbed attention a token has received, averaged over the query group.

    A query adds `softmax_j((x_j + noise * z_j) / tau)`, x its logits over the slots it sees and z of the standard Gumbel
    distribution, drawn anew for every query, slot, head and layer. `tau = temperature + growth * t` for the t-th token
    after the prompt, `temperature` for those of the prompt.

    Args:
      temperature: of the prompt's queries, above 0.
      growth: of the temperature with every token that follows.
      noise: factor of the noise; 0 draws none.
      seed: of the noise; a query and a slot get the same at every call and in every row.

    Source: Adnan et al., Keyformer (2024), arXiv:2403.09054, section 3.2 and its official code.
    """
    if temperature <= 0 or growth < 0 or noise < 0:
        raise ValueError(
            f"temperature must be above 0, growth and noise at least 0, got {temperature}, {growth} and {noise}."
        )
    stat = "perturbed_attention"

    def observe(segment: DenseSegment, seen: LayerObservation) -> DenseSegment:
        if segment.key_rope != "stored":
            raise TypeError("gumbel_attention scores rotated keys; put it before what re-indexes them.")
        if seen.prompt is None:
            raise TypeError("gumbel_attention counts tokens from the end of the prompt: use it in evict or merge.")
        queries = seen.queries
        B, T, N, H = queries.raw.shape
        K, S = segment.pos.shape[1:]
        if not T or not S:
            return segment
        keys, k_pos = segment.k.astype(jnp.float32), segment.pos[:, :, None, None]
        heads = (jnp.arange(N) + N * seen.layer).reshape(K, N // K, 1, 1)
        size = min(T, _BLOCK)
        count = -(-T // size)

        def blocks(x, fill):
            x = jnp.pad(x, [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
            return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

        def add(total, block):
            q, pos = block  # [B, t, N, H], i32[B, t]
            grouped = q.reshape(B, size, K, N // K, H)
            logits = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, precision=jax.lax.Precision.HIGHEST)
            logits = capped(factor(seen.scale, H) * logits, seen.scale)
            q_pos = pos[:, None, None, :, None]
            if noise:
                logits = logits + noise * _gumbel(seed, heads, q_pos, k_pos)
            later = jnp.maximum(q_pos - seen.prompt[:, None, None, None, None] + 1, 0)
            logits = logits / (temperature + growth * later)
            sees = (k_pos >= 0) & (k_pos <= q_pos)
            if seen.window is not None:
                sees &= k_pos > q_pos - seen.window
            p = jax.nn.softmax(jnp.where(sees, logits, -1e30), axis=-1)
            return total + jnp.mean(jnp.sum(jnp.where(sees, p, 0.0), axis=3), axis=2), None

        given = (blocks(queries.rotated.astype(jnp.float32), 0.0), blocks(queries.pos, -1))
        received, _ = jax.lax.scan(add, jnp.zeros(segment.pos.shape, jnp.float32), given)
        return segment.replace(stats={**segment.stats, stat: segment.stats[stat] + received})

    score = lambda segment, seen: segment.stats[stat]
    return Scorer(score=score, needs=Needs(queries=ALL), stats=(stat,), observe=observe)


def _gumbel(seed: int, *numbers: jax.Array) -> jax.Array:
    """f32: standard Gumbel noise that is a function of a seed and of integers, which broadcast."""
    mixed = jnp.uint32(seed & 0xFFFFFFFF)
    for x in numbers:
        mixed = _mixed(mixed ^ x.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))
    uniform = ((mixed >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # in (0, 1), exact
    return -jnp.log(-jnp.log(uniform))


def _mixed(x: jax.Array) -> jax.Array:
    """u32: the finaliser of MurmurHash3, a permutation that spreads every bit."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16
