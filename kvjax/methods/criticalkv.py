"""CriticalKV: what counts is how far the layer's output moves, not attention alone.

Feng, Lv, Guo, Cao, Zhou, Xie. "CriticalKV: Optimizing KV Cache Eviction from an Output Perturbation Perspective".
2025. arXiv:2502.03805.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.budget import Budget
from kvjax.scores import Pooling, output_perturbation, window_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict, learned


def criticalkv(
    calibration: Mapping[str, jax.Array],
    budget: Budget = 1024,
    window: int = 32,
    kernel: int = 5,
    pooling: Pooling = "avg",
    first: float = 0.5,
    epsilon: float = 1e-4,
) -> CacheTransform:
    """Keeps the last `window` tokens, half of the others by SnapKV's scores, half by these times `||W_o v||_1`.

    See `kvjax.scores.output_perturbation`.

    Deviations: scores and norms are averaged over the query heads of a group, as in kvpress. The two shares are of what
    the budget holds beside the window; kvpress counts the window in the first. Over Ada-KV's budgets by head, which the
    paper has too, it is not implemented: the first share needs the number of a head before it is known.

    Args:
      calibration: of `experiments.calibrate --method=criticalkv`: `output` f32[L, N, H, D], the model's output
        projections; held beside its weights, not in the cache.
      budget: tokens per KV head, the window included.
      window: observed queries at the end of the prompt.
      kernel: tokens over which scores are pooled, odd.
      pooling: "avg" or "max".
      first: share that attention decides alone (the paper's alpha).
      epsilon: added to attention in the second share.
    """
    scorer = output_perturbation(window_attention(window, kernel, pooling), first, epsilon)
    parts = [{"output": output} for output in calibration["output"]]
    return learned(at_prefill_end(evict(scorer, budget, recent=window)), parts)
