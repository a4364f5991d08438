"""MPCache, its static stage: what any of the last queries looks at, the same tokens in every head.

Zeng, Dong, Zhou, Ma, Tan, Wang, Li. "MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference".
2025. arXiv:2501.06807.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import end_attention, over_heads
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def mpcache_static(budget: Budget = 0.3, last: Budget = 0.2) -> CacheTransform:
    """Keeps the tokens to which any of the prompt's last queries gives most; what is generated is always kept.

    Deviations: a budget takes the place of the threshold, which the official code applies to a softmax without scale
    and mask, and tunes for each data set. The largest probability is that of each KV head, then averaged; there, of
    the average over heads. The dynamic stage, which reads a part of what is kept at every step, is that of `mpcache`.

    Bytes: 4 a slot beside those of the kept tokens, for the attention that is noted while the prompt arrives.

    Args:
      budget: tokens per KV head, the same ones in every head of a layer (30% on HotpotQA, 15% on NarrativeQA).
      last: queries that are looked at, as a count or as a fraction of the prompt.
    """
    return at_prefill_end(evict(over_heads(end_attention(last, "max")), budget, recent=1))
