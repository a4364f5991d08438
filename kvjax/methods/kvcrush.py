"""KVCrush: a part of the budget for tokens that stand for what is dropped.

Jha, Gobriel, Talamanova, Jain. "KVCrush: Key Value Cache Size-Reduction Using Similarity in Head-Behaviour". 2025.
arXiv:2503.00022.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.score_wrappers import Anchor
from kvjax.scores import crushed, window_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def kvcrush(
    budget: Budget = 0.25,
    share: float = 0.25,
    anchor: Anchor = "alternate",
    window: int = 32,
    kernel: int = 5,
    sinks: int = 4,
) -> CacheTransform:
    """Keeps the last `window` tokens, those they attend to most, and representatives of the others.

    Tokens are grouped by which heads would keep them; see `kvjax.scores.crushed`. All heads keep the same tokens.

    Deviations: it acts on tokens, over SnapKV's scores; the implementations act on pages of 16, over H2O's or SnapKV's.
    Bits are of KV heads. The paper buckets tokens by distance and takes one of each bucket; the implementations take
    evenly spaced ones, as here.

    Args:
      budget: tokens per KV head, the window and the sinks included.
      share: of what the budget holds beside them, for representatives.
      anchor: "alternate", "zeros", "ones" or "mean".
      window: observed queries at the end of the prompt.
      kernel: tokens over which scores are pooled, odd.
      sinks: first tokens, always kept.
    """
    scorer = crushed(window_attention(window, kernel), share, anchor)
    return at_prefill_end(evict(scorer, budget, sinks=sinks, recent=window))
