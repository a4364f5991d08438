"""ALISA: the newest tokens, and those that the last few queries attend to.

Zhao, Wu, Wang. "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching". ISCA 2024.
arXiv:2403.17312.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import window_attention
from kvjax.transforms import CacheTransform, chain, every_step, evict, quantize


def alisa(
    budget: Budget = 0.2, recent: Budget = 0.5, window: int = 8, bits: int | None = 8, group: int = 32
) -> CacheTransform:
    """Keeps, at every step, the newest tokens and those with most attention from the last `window` queries.

    This is the paper's sparse window attention, H2O whose sums forget, and its 8-bit keys and values.

    Deviations: there is no official code. How many steps are summed is unverified. The sums are of the queries over
    what the cache holds now, averaged over a query group. Channels of a token share a scale, as slots are written and
    dropped one by one; the paper's are of channels. The schedule between GPU, CPU and recomputation is that of a
    serving system.

    Args:
      budget: tokens per KV head, as a count or as a fraction of the prompt (the paper keeps a fifth).
      recent: share of the budget (float) or tokens (int) given to the newest; of less than `window`, the others among
        the last `window` tokens are the first to go.
      window: queries whose attention is summed.
      bits: of a number; None: keys and values are kept as they are.
      group: channels of a token that share a scale.

    Raises:
      ValueError: fewer newest tokens than queries.
    """
    if isinstance(recent, int) and recent < window:
        raise ValueError(f"recent must be at least the window of {window} queries, got {recent}.")
    sparse = every_step(evict(window_attention(window, kernel=1), budget, recent=recent))
    if bits is None:
        return sparse
    return chain(sparse, quantize(bits, key_axis="token", key_group=group, value_group=group, residual=0))
