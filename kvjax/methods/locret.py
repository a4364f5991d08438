"""Locret: a small network in every layer says which tokens to retain, from their own query, key and value.

Huang, Yuan, Han, Xiao, Liu. "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads".
2024. arXiv:2410.01805.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.budget import Budget
from kvjax.scores import retaining_heads
from kvjax.transforms import CacheTransform, chain, every_chunk, evict, learned, reindex


def locret(
    calibration: Mapping[str, jax.Array],
    budget: Budget = 6000,
    stabilizers: Budget = 0.25,
    sinks: int = 0,
    reindexed: bool = True,
) -> CacheTransform:
    """Keeps, after every chunk of the prompt, the tokens with the highest retaining scores of each KV head.

    A token's scores are made once, when it is read, and depend on nothing that comes after it; they stay beside it in
    the cache. Positions count what the cache holds. Decoding appends and drops nothing.

    Deviations: the newest tokens are protected after the last chunk as after the others, so that the tokens that
    the paper processes last, unevicted, are part of the budget.

    Args:
      calibration: of `experiments.train --gin_file=configs/runs/train_locret.gin`: `hidden` f32[L, (N + 2 K) H, F] and
        `out` f32[L, F, K]; these are held beside the model's weights, not in the cache.
      budget: tokens per KV head (the official default is 6000), as a count or as a fraction of the prompt.
      stabilizers: newest tokens that are always kept: a count (2500 there), or a fraction of the budget.
      sinks: first tokens that are always kept (0 there).
      reindexed: positions inside the cache, as in the paper; False keeps the original ones.

    Raises:
      ValueError: the budget cannot hold the stabilizers and the sinks.
    """
    keep = evict(retaining_heads(), budget, sinks=sinks, recent=stabilizers)
    parts = [{"hidden": hidden, "out": out} for hidden, out in zip(calibration["hidden"], calibration["out"])]
    keep = every_chunk(learned(keep, parts))
    return chain(reindex(), keep) if reindexed else keep
