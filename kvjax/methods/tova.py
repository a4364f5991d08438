"""TOVA: drop the token that the newest query attends to least.

Oren, Hassid, Yarden, Adi, Schwartz. "Transformers are Multi-State RNNs". EMNLP 2024. arXiv:2401.06104.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import last_query_attention
from kvjax.transforms import CacheTransform, every_step, evict


def tova(budget: Budget = 512) -> CacheTransform:
    """Keeps, at every step, the tokens with most attention from the newest query, averaged over all heads.

    Deviation: when several tokens arrive in one call, the last of them decides for all.

    Args:
      budget: tokens per KV head, the same tokens in every head of a layer.
    """
    return every_step(evict(last_query_attention(), budget, recent=1))
