"""HeadKV: heads that retrieve keep more.

Fu, Cai, Asi, Xiong, Dong, Xiao. "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated
Retrieval and Reasoning". ICLR 2025. arXiv:2410.19258.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.budget import Budget
from kvjax.scores import Pooling, window_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict_across_layers
from kvjax.transforms.evict_across_layers import proportional


def headkv(
    calibration: Mapping[str, jax.Array],
    budget: Budget = 1024,
    beta: float = 1.2,
    window: int = 32,
    kernel: int = 7,
    pooling: Pooling = "max",
    page: int = 16,
) -> CacheTransform:
    """SnapKV's scores with a budget for every head of every layer, by how much it retrieves.

    With n slots a head beside the window, L K heads and scores s that sum to one, head h keeps
    `(1 - 1 / beta) n + s_h / beta n L K`, at most what there is; what that leaves over is spread evenly.

    Deviations: scores are of KV heads, the mean of their query group, as are budgets. They are measured on texts with a
    needle of random tokens that is repeated at the end, read and not generated; the paper lets the model answer
    questions about a needle, with reasoning.

    Args:
      calibration: of `experiments.calibrate --method=headkv`: `retrieval` f32[L, K].
      budget: tokens per KV head on average over the cache, the window included.
      beta: at least 1; the larger, the more even (the paper tries 1.005 to 10).
      window: observed queries at the end of the prompt, kept in every head.
      kernel: tokens over which scores are pooled, odd.
      pooling: "avg" or "max".
      page: slots of a page.

    Raises:
      ValueError: beta is below 1, or scores that are negative or all zero.
    """
    if beta < 1:
        raise ValueError(f"beta must be at least 1, got {beta}.")
    retrieval = np.asarray(calibration["retrieval"], np.float64).ravel()
    if retrieval.min() < 0 or retrieval.sum() == 0:
        raise ValueError(f"retrieval must be at least 0 and not all 0, got {retrieval.min()} to {retrieval.max()}.")
    weights = 1 - 1 / beta + retrieval / retrieval.mean() / beta
    heads = proportional(jnp.asarray(weights, jnp.float32)[None])
    return at_prefill_end(
        evict_across_layers(window_attention(window, kernel, pooling), budget, heads=heads, recent=window, page=page)
    )
