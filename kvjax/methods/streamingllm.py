"""StreamingLLM: attention sinks and a window of the newest tokens, positions counted inside the cache.

Xiao, Tian, Chen, Han, Lewis. "Efficient Streaming Language Models with Attention Sinks". ICLR 2024.
arXiv:2309.17453.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.transforms import CacheTransform, ring


def streamingllm(budget: Budget = 516, sinks: int = 4, reindex: bool = True) -> CacheTransform:
    """Keeps the first `sinks` tokens and the newest `budget - sinks`, in constant memory for ever.

    Positions are those inside the cache: the sinks stand right before the window, whatever has left it. Window keys are
    read as they were rotated, since their distances to the query are the same; only for the sinks is the query rotated
    at its rank in the cache. Distances never exceed the cache's size plus the tokens of the current call.

    Args:
      budget: tokens per KV head, sinks included (the official class keeps 4 and 512); a fraction of each row's prompt
        never falls below the sinks and one token.
      sinks: first tokens that are never overwritten.
      reindex: positions inside the cache, as in the paper; False keeps the original ones.
    """
    return ring(budget, sinks=sinks, reindexed=reindex)
