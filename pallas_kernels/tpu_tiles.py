"""What the tiles of a TPU ask of the blocks that kernels read and write."""

from __future__ import annotations

import jax

LANES, SUBLANES = 128, 8
"""A register: the last two axes of an array in HBM are padded to whole ones."""


def slots_minor(x: jax.Array) -> bool:
    """Whether slots of `[B, K, S, H]` fill lanes better than channels do."""
    filled = lambda n: n / (-(-n // LANES) * LANES)
    return filled(x.shape[2]) > filled(x.shape[3])


def kv_heads_per_block(K: int, G: int, H: int) -> int:
    """KV heads that a block takes at a time from [B, T, N * H] and [B, N, S].

    The fewest of which the queries, `heads * G * H` wide, are whole lanes and `heads * G` whole sublanes; else all.
    """
    fits = (heads for heads in range(1, K) if K % heads == 0 and _whole(heads * G, H))
    return next(fits, K)


def _whole(rows: int, H: int) -> bool:
    return rows * H % LANES == 0 and rows % SUBLANES == 0
