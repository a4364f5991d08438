"""LagKV: tokens that lie unevenly in the range of the tokens after them.

Liang, Zhang, Li, Li. "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important". 2025.
arXiv:2504.04704.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import lag_relative
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def lagkv(budget: Budget = 0.5, lag: int = 128, sinks: int = 4) -> CacheTransform:
    """Keeps, per KV head and partition, the tokens whose keys and values spread most in the next partition's range.

    See `kvjax.scores.lag_relative`. It looks at no query, and so at no question.

    Deviations: the budget decides how many tokens of each partition stay, the same number up to one, as in kvpress;
    the paper keeps a fixed fraction of each. It acts when the prompt is in; the paper goes on to compress each
    partition that is generated. A budget below the sinks and the newest, unjudged tokens (up to `2 * lag - 1`) keeps
    the newest of these; kvpress keeps any.

    Args:
      budget: tokens per KV head.
      lag: tokens of a partition (the paper's L).
      sinks: first tokens, always kept (the paper's S; 16 there, 4 in kvpress).
    """
    return at_prefill_end(evict(lag_relative(lag, sinks), budget, sinks=sinks))
