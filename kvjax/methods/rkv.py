"""R-KV: keep what is attended to and does not repeat what is kept.

Cai, Xiao, Sun, Luo, Zhang, Wan, Li, Zhou, Chang, Gu, Dong, Anandkumar, Asi, Hu. "R-KV: Redundancy-aware KV Cache
Compression for Reasoning Models". 2025. arXiv:2505.24133.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import blend, redundancy, window_attention
from kvjax.transforms import CacheTransform, every, evict


def rkv(
    budget: Budget = 1024,
    window: int = 8,
    kernel: int = 7,
    mix: float = 0.1,
    threshold: float = 0.5,
    interval: int = 128,
) -> CacheTransform:
    """Every `interval` tokens keeps the newest `window` and, per KV head, those of highest `mix I - (1 - mix) R`.

    I is the attention of the last `window` queries, pooled by its maximum over `kernel` neighbours; R is the softmax
    of a key's mean similarity to the others, see `kvjax.scores.redundancy`.

    Deviations: I is the mean over a query group of the model's own probabilities; the official code takes the largest
    logit of a group and a softmax without the window. A key that resembles no other blames none; there, its similarity
    to the first slot is left out. Of a prompt that comes in one call the whole is judged at its end.

    Args:
      budget: tokens per KV head, the window included; up to `interval` more between two evictions.
      window: newest tokens, always kept, whose queries are observed.
      kernel: tokens over which attention is pooled, odd.
      mix: weight of attention (the paper's lambda; its code has 0.07).
      threshold: cosine above which keys repeat each other; of those the newest counts as new.
      interval: tokens between evictions (the paper's buffer).

    Raises:
      ValueError: mix is outside [0, 1], or the budget cannot hold the window.
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1], got {mix}.")
    scorer = blend([(mix, window_attention(window, kernel, "max")), (1 - mix, redundancy(threshold))])
    return every(interval, evict(scorer, budget, recent=window))
