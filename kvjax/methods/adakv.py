"""Ada-KV: heads that need more keep more.

Feng, Lv, Cao, Xie, Zhou. "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
Inference". NeurIPS 2025. arXiv:2407.11550.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import Pooling, future_attention, window_attention
from kvjax.transforms import CacheTransform, adaptive, at_prefill_end, evict_by_head


def adakv_snapkv(
    budget: Budget = 1024,
    window: int = 32,
    kernel: int = 7,
    pooling: Pooling = "max",
    floor: float = 0.2,
    normalise: bool = True,
    page: int = 16,
) -> CacheTransform:
    """SnapKV's scores compared over all heads of a layer; the heads' slots are pages of one pool.

    The defaults are those of KVCache-Factory: a floor of 0.2, normalised. The authors' code has 0.5, and does not
    normalise unless told to.

    Deviation: scores are averaged over a query group before pooling, so that each KV head is stored once.

    Args:
      budget: tokens per KV head on average over the layer, the window included.
      window: observed queries at the end of the prompt, kept in every head.
      kernel: tokens over which scores are pooled, odd.
      pooling: "avg" or "max".
      floor: fraction of the uniform share that every head keeps at least.
      normalise: weigh a head by the mass of its highest scores first.
      page: slots of a page.
    """
    heads = adaptive(floor, normalise)
    return at_prefill_end(
        evict_by_head(window_attention(window, kernel, pooling), budget, heads=heads, recent=window, page=page)
    )


def adakv_expected(
    budget: Budget = 1024, future: int = 512, sinks: int = 4, floor: float = 0.2, page: int = 16
) -> CacheTransform:
    """The same over expected attention, which needs no question to look at; floor and scores are as in kvpress.

    Args:
      budget: tokens per KV head on average over the layer.
      future: see `expected_attention`.
      sinks: first tokens, kept in every head.
      floor: see `adakv_snapkv`.
      page: slots of a page.
    """
    scorer = future_attention(future, sinks)
    return at_prefill_end(evict_by_head(scorer, budget, heads=adaptive(floor), sinks=sinks, page=page))
