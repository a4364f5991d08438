"""DuoAttention: retrieval heads keep everything, the others sinks and a window.

Xiao, Tang, Zuo, Guo, Yang, Tang, Fu, Han. "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and
Streaming Heads". ICLR 2025. arXiv:2410.10819.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from kvjax.transforms import CacheTransform, from_first_chunk, split_heads


def duoattention(
    calibration: Mapping[str, jax.Array], sparsity: float = 0.5, sinks: int = 64, recent: int = 256
) -> CacheTransform:
    """Makes streaming heads of the `sparsity` of all KV heads with the lowest scores.

    Deviations: scores are how strongly a head copies from repeated random tokens (induction, training-free), not
    trained gates. As in the paper, a prompt that comes in chunks streams from the first of them on.

    Args:
      calibration: of `experiments.calibrate --method=duoattention`: `induction` f32[L, K].
      sparsity: fraction of the KV heads that stream.
      sinks: first tokens that a streaming head keeps.
      recent: newest tokens that a streaming head keeps.

    Raises:
      ValueError: sparsity is outside [0, 1].
    """
    return _by_score(calibration["induction"], sparsity, sinks, recent)


def duoattention_trained(
    calibration: Mapping[str, jax.Array], sparsity: float = 0.5, sinks: int = 64, recent: int = 256
) -> CacheTransform:
    """Makes streaming heads of the `sparsity` of all KV heads with the lowest trained gates.

    Deviations: those of the recipe, `experiments.recipes.duoattention.train_duoattention`.

    Args:
      calibration: of `experiments.train --gin_file=configs/runs/train_duoattention.gin`: `gates` f32[L, K].
      sparsity: see `duoattention`.
      sinks: see `duoattention`.
      recent: see `duoattention`.

    Raises:
      ValueError: sparsity is outside [0, 1].
    """
    return _by_score(calibration["gates"], sparsity, sinks, recent)


def _by_score(scores: jax.Array, sparsity: float, sinks: int, recent: int) -> CacheTransform:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}.")
    scores = np.asarray(scores)
    streaming = np.argsort(scores, axis=None, kind="stable")[: round(sparsity * scores.size)]
    full = ~np.isin(np.arange(scores.size), streaming).reshape(scores.shape)
    return from_first_chunk(split_heads([np.flatnonzero(heads) for heads in full], sinks=sinks, recent=recent))
