"""CaM: the value of a token that leaves the window is added to the values of those that follow.

Zhang, Du, Luo, Zhong, Zhang, Liu, Ji. "CaM: Cache Merging for Memory-efficient LLMs Inference". ICML 2024.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention
from kvjax.transforms import CacheTransform, every_step, into_next, merge


def cam(
    budget: Budget = 0.2, sinks: int = 4, recent: Budget = 1.0, following: int = 16
) -> CacheTransform:
    """Keeps the first tokens and a window, and merges the value of each token that leaves it into the next ones.

    A value goes to the next `following` tokens in equal parts, times the attention that its token has received over the
    mean of what those have, at most 1. With `recent` below 1 the rest of the budget is of the most attended tokens, as
    in H2O, and what is dropped is merged in the same way.

    Deviations: the probability of the paper's random mask takes the place of the mask: what is added is its mean. Of
    the tokens that a prompt drops at once only the newest `following` are merged; token by token, as in the paper,
    values would be passed on from each to the next. The mean is over the tokens a value goes to, as in the paper's
    streaming code; that of its simulation has a maximum over start and recent. Attention is averaged over a query
    group.

    Args:
      budget: tokens per KV head (the paper's simulation: 0.1 first and 0.1 recent).
      sinks: first tokens, always kept.
      recent: share of what the sinks leave (float) or tokens (int) given to the newest.
      following: tokens that a value is shared among.
    """
    return every_step(merge(accumulated_attention(), budget, into_next(following), sinks=sinks, recent=recent))
