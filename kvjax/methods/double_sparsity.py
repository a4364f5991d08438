"""Double Sparsity: a few channels of the keys tell which tokens to read.

Yang, Sheng, Gonzalez, Stoica, Zheng. "Post-Training Sparse Attention with Double Sparsity". 2024. arXiv:2408.07092.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from kvjax.budget import Budget
from kvjax.segments.indices import Labels
from kvjax.transforms import CacheTransform, select


def double_sparsity(
    calibration: Mapping[str, jax.Array],
    read: Budget = 0.0625,
    channels: int | float = 0.25,
    dense_layers: Sequence[int] = (0, 1),
    each: int = 8,
) -> CacheTransform:
    """Stores everything, and of every key the strongest `channels` a second time; these choose the tokens to read.

    A token's score is `<q_C, k_C>` over the channels C of its KV head, whose mean `|q * k|` was largest on text.

    Deviations: labels are not quantized; they are chosen from rotated queries and keys, as the paper's "qk" outlier
    type is; the heads of a group share labels, and read the same tokens.

    Args:
      calibration: of `experiments.calibrate --method=double_sparsity`: `strength`, f32[L, K, H].
      read: tokens per KV head that a query reads.
      channels: of a label, as a count or as a fraction of the H channels (the paper goes down to 1/16 of 128).
      dense_layers: layers that read everything.
      each: calls of at most so many tokens choose for each; longer ones read everything.

    Raises:
      ValueError: channels are none, or more than there are.
    """
    strength = jnp.asarray(calibration["strength"])
    H = strength.shape[-1]
    count = round(channels * H) if isinstance(channels, float) else channels
    if not 1 <= count <= H:
        raise ValueError(f"channels must be from 1 to the {H} channels of a head, got {channels}.")
    _, strongest = jax.lax.top_k(strength, count)
    indices = [Labels(channels=of_layer) for of_layer in jnp.sort(strongest, axis=-1)]
    return select(indices, read, page=1, dense_layers=dense_layers, each=each)
