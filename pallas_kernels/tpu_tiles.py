"""What the tiles of a TPU ask of the blocks that kernels read and write."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES, SUBLANES = 128, 8
"""A register: the last two axes of an array in HBM are padded to whole ones."""


def kv_heads_per_block(K: int, G: int, H: int) -> int:
    """KV heads that a block takes at a time from [B, T, N * H] and [B, N, S].

    The fewest of which the queries, `heads * G * H` wide, are whole lanes and `heads * G` whole sublanes; else all.
    """
    fits = (heads for heads in range(1, K) if K % heads == 0 and _whole(heads * G, H))
    return next(fits, K)


def slots_are_minor(H: int) -> bool:
    """Whether keys and values [B, K, S, H] are to be read as [B, K, H, S].

    XLA keeps narrow heads so, because lanes would be half empty; a kernel that wants H minor makes it copy them.
    """
    return H % LANES != 0


def product_precision(dtype) -> jax.lax.Precision:
    """float32 stays float32: the default of the TPU rounds the operands of a product to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _whole(rows: int, H: int) -> bool:
    return rows * H % LANES == 0 and rows % SUBLANES == 0
