"""H2O: heavy hitters by accumulated attention, and the newest tokens.

Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang, Chen. "H2O: Heavy-Hitter Oracle for
Efficient Generative Inference of Large Language Models". NeurIPS 2023. arXiv:2306.14048.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention
from kvjax.transforms import CacheTransform, every_step, evict


def h2o(
    budget: Budget = 0.2, recent: Budget = 0.5, normalise: bool = False
) -> CacheTransform:
    """Keeps the newest tokens and those that have received most attention so far; acts at every step.

    Deviations: scores are averaged over the query heads of a group and kept for each row of a batch (the
    official code sums over the batch and does not support groups). When several tokens arrive in one call
    they are all seen before any is evicted.

    Args:
      budget: tokens per KV head (the paper's default: 0.1 heavy and 0.1 recent).
      recent: share of the budget (float) or tokens (int) given to the newest.
      normalise: rank by attention per query that could see the token, as kvpress does.
    """
    return every_step(evict(accumulated_attention(normalise), budget, recent=recent))
