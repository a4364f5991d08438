"""SnapKV: keep what the end of the prompt attends to.

Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai, Lewis, Chen. "SnapKV: LLM Knows What You are Looking for Before
Generation". NeurIPS 2024. arXiv:2404.14469.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import Pooling, window_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def snapkv(
    budget: Budget = 1024, window: int = 32, kernel: int = 5, pooling: Pooling = "avg"
) -> CacheTransform:
    """Keeps the last `window` tokens and, per KV head, the tokens they attend to most.

    Deviation: scores are averaged over the query heads of a group, so that each KV head is stored once; the
    official code stores a copy per query head.

    Args:
      budget: tokens per KV head, the window included.
      window: observed queries at the end of the prompt.
      kernel: tokens over which scores are pooled, odd.
      pooling: "avg" or "max".
    """
    return at_prefill_end(evict(window_attention(window, kernel, pooling), budget, recent=window))
