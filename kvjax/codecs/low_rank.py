"""Matrices of a few tokens each, as products of two thin ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

_OUTER = 4  # ranks up to which outer products are faster than products of thin matrices


class Factors(NamedTuple):
    """Rank-R approximation of every block of tokens of every head: `x[block] ~ tokens[block]^T channels[block]`."""

    tokens: Float[Array, "B K R S"]
    channels: Float[Array, "B K S/block*R H"]


def factorize(x: Float32[Array, "B K S H"], *, rank: int, block: int, loops: int, dtype) -> Factors:
    """The `rank` strongest directions of every block, by power iteration from a fixed random start.

    With E a block: `loops` times `P = E A`, `A = E^T P`, columns made orthonormal before each product; then
    `E ~ P A^T`, the projection of E on P. The second factor is computed against the first as it is stored.

    Args:
      x: f32[B, K, S, H].
      rank: [R], at most `block` and H.
      block: tokens of a block; divides S.
      loops: iterations, at least 1.
      dtype: of the factors.

    Source: Kang et al., GEAR (2024), algorithm 2; Vogels et al., PowerSGD (2019).
    """
    B, K, S, H = x.shape
    blocks = x.reshape(B, K, S // block, block, H)
    a = jnp.broadcast_to(start(H, rank), (B, K, S // block, H, rank))
    for _ in range(loops):
        p = _orthonormal(jnp.matmul(blocks, _orthonormal(a))).astype(dtype)
        a = jnp.matmul(blocks.swapaxes(3, 4), p.astype(x.dtype))
    tokens = p.reshape(B, K, S, rank).swapaxes(2, 3)
    return Factors(tokens, a.astype(dtype).swapaxes(3, 4).reshape(B, K, -1, H))


def start(channels: int, rank: int) -> Float32[Array, "channels rank"]:
    """f32[channels, rank] normal numbers, the same for every block: what power iteration starts from."""
    return jax.random.normal(jax.random.key(0), (channels, rank))


def add_product(x: jax.Array, factors: Factors, *, block: int) -> jax.Array:
    """`x[B, K, S, H]` with the product of the factors added."""
    B, K, S, H = x.shape
    tokens = factors.tokens.astype(x.dtype).reshape(B, K, -1, S // block, block)
    channels = factors.channels.astype(x.dtype).reshape(B, K, S // block, -1, H)
    rank = tokens.shape[2]
    if rank > _OUTER:
        return x + jnp.einsum("bkrns,bknrh->bknsh", tokens, channels).reshape(x.shape)  # n: blocks
    # Outer products, elementwise: XLA makes one loop of them and what x is made of.
    return x + sum(tokens[:, :, r, ..., None] * channels[:, :, :, r, None] for r in range(rank)).reshape(x.shape)


def _orthonormal(x: jax.Array) -> jax.Array:
    """Gram-Schmidt over the last axis; a column that depends on the ones before it becomes zero."""
    dot = lambda a, b: jnp.sum(a * b, axis=-2, keepdims=True)

    def add(j, done):
        column = jax.lax.dynamic_slice_in_dim(x, j, 1, axis=-1)
        before = jnp.sqrt(dot(column, column))
        for _ in range(2):  # once leaves float32 errors that the division by a small norm blows up
            column = column - jnp.sum(done * dot(done, column), axis=-1, keepdims=True)
            norm = jnp.sqrt(dot(column, column))
            depends = norm <= 1e-6 * before
            column = jnp.where(depends, 0.0, column / jnp.where(depends, 1.0, norm))
            before = jnp.ones_like(before)
        return jax.lax.dynamic_update_slice_in_dim(done, column, j, axis=-1)

    return jax.lax.fori_loop(0, x.shape[-1], add, jnp.zeros_like(x))
