"""LazyEviction: tokens come back; wait a window before judging them.

Zhang, Shen, Wang, et al. "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long
Reasoning". 2025. arXiv:2506.15969.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import recurrence
from kvjax.transforms import CacheTransform, every, evict


def lazyeviction(budget: Budget = 1024, window: int = 128, alpha: float = 1e-4) -> CacheTransform:
    """Every `window` tokens keeps the newest `window` and, per KV head, those most likely to recur.

    Made for long generations: on a prompt with a short answer it acts once, on what the prompt's own queries came back
    to.

    Deviations: `alpha` and `window` were tuned per model in the paper (5e-4 or 1e-4; the 80th percentile of the rests,
    as 175). The paper tracks tokens while decoding; here the queries of the prompt count as steps too, so that the
    prompt is judged by more than its last query.

    Args:
      budget: tokens per KV head, the window included; up to `window` more between two evictions.
      window: tokens between evictions, and those that are always kept.
      alpha: attention above which a token is active.
    """
    return every(window, evict(recurrence(alpha, window), budget, recent=window))
