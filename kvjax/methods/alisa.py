"""ALISA: the newest tokens, and those that the last few queries attend to.

Zhao, Wu, Wang. "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching". ISCA 2024.
arXiv:2403.17312.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import window_attention
from kvjax.transforms import CacheTransform, every_step, evict


def alisa(budget: Budget = 0.2, recent: Budget = 0.5, window: int = 8) -> CacheTransform:
    """Keeps, at every step, the newest tokens and those with most attention from the last `window` queries.

    This is the paper's sparse window attention: H2O whose sums forget.

    Deviations: there is no official code. How many steps are summed is unverified. The sums are of the queries over
    what the cache holds now, averaged over a query group. 8-bit keys and values are not beside it: what drops a token
    at every step has no packed form here. The schedule between GPU, CPU and recomputation is that of a serving system.

    Args:
      budget: tokens per KV head, as a count or as a fraction of the prompt (the paper keeps a fifth).
      recent: share of the budget (float) or tokens (int) given to the newest; of less than `window`, the others among
        the last `window` tokens are the first to go.
      window: queries whose attention is summed.

    Raises:
      ValueError: fewer newest tokens than queries.
    """
    if isinstance(recent, int) and recent < window:
        raise ValueError(f"recent must be at least the window of {window} queries, got {recent}.")
    return every_step(evict(window_attention(window, kernel=1), budget, recent=recent))
