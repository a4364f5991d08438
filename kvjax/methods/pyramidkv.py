"""PyramidKV: lower layers keep more.

Cai, Zhang, Gao, Liu, Li, Liu, Lu, Xiong, Dong, Hu, Xiao. "PyramidKV: Dynamic KV Cache Compression based on Pyramidal
Information Funneling". 2024. arXiv:2406.02069.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import Pooling, window_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict, pyramid


def pyramidkv(
    budget: Budget = 2048, window: int = 32, kernel: int = 5, pooling: Pooling = "avg", beta: int = 20
) -> CacheTransform:
    """SnapKV's scores with budgets that fall linearly from the first layer to the last.

    Each row of a batch is split by its own length. Under twice the budget that is evenly, and so, where the budget is a
    count, every layer has room for as many tokens, however little it keeps of a long prompt.

    Deviations: budgets add up to what was asked for; the official code rounds the step between layers down, and keeps a
    tenth more at small budgets. Whether a prompt is under twice the budget is asked of both without the window.

    Args:
      budget: tokens per KV head on average over the layers, the window included.
      window: observed queries at the end of the prompt, kept in every layer.
      kernel: tokens over which scores are pooled, odd.
      pooling: "avg" or "max".
      beta: the last layer keeps about `1 / beta` of the average beside the window.
    """
    scorer = window_attention(window, kernel, pooling)
    return at_prefill_end(evict(scorer, budget, recent=window, layers=pyramid(beta)))
