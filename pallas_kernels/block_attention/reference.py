"""`block_attention` in jnp: the chosen blocks are gathered, one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.partial import Partial, fold


def block_attention(q, k, v, pos, index, *, block, window=None, scale=None) -> Partial:
    """See `pallas_kernels.block_attention.api.block_attention`."""
    (B, T, N, _), K, count = q.shape, k.shape[1], index.shape[2]
    in_blocks = lambda x: x.reshape(B, x.shape[1], count, block, -1)  # [B, K, I, block, H]
    k, v, k_pos = in_blocks(k), in_blocks(v), in_blocks(pos[:, None])
    queries = lambda x: jnp.moveaxis(x.reshape(B, count, block, *x.shape[2:]), 1, 0)

    def attend(of):
        q, q_pos, index = of  # [B, block, N, H], [B, block], [B, N, P]

        def part(turn):
            at = jax.lax.dynamic_index_in_dim(index, turn, axis=2, keepdims=False)  # [B, N]
            read = jnp.clip(at, 0, count - 1)
            by_head = read.reshape(B, K, N // K, 1, 1)
            take = lambda x, by: jnp.take_along_axis(x, by, axis=2).reshape(B, N, block, x.shape[-1])
            slot_pos = take(k_pos, read.reshape(B, 1, N, 1, 1))[..., 0]
            slot_pos = jnp.where(at[..., None] < 0, -1, slot_pos)
            return decode_attention(q, take(k, by_head), take(v, by_head), q_pos, slot_pos, window=window, scale=scale)

        return fold(part, jnp.max(jnp.sum(index >= 0, axis=-1)))

    parts = jax.lax.map(attend, (queries(q), queries(pos), jnp.moveaxis(index, 2, 0)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), parts)
