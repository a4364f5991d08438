"""WindowKV: keep windows of eight neighbouring tokens, the same ones in a group of layers.

Zuo, Wei, Zhang, Liu, Lu, Song. "WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM
Inference". 2025. arXiv:2503.17922.
"""

from __future__ import annotations

from typing import Literal, get_args

from kvjax.budget import Budget
from kvjax.scores import in_blocks, over_heads, window_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict, pyramid

Strategy = Literal["max", "average"]
"""What a window is worth: the mean of its more attended half (to find something), or of all of it (to sum it up)."""


def windowkv(
    budget: Budget = 1024,
    strategy: Strategy = "max",
    suffix: int | None = None,
    window: int = 8,
    group: int = 8,
    beta: float = 1.75,
) -> CacheTransform:
    """Keeps the last `suffix` tokens and the windows that these attend to most; the same tokens in all heads.

    The first layer of every `group` chooses for the others. Budgets fall linearly from the first group to the last.

    Deviations: the strategy is a setting; in the paper a classifier that was trained on prompts chooses it. The budget
    is met exactly: of the last window that is chosen the oldest tokens stay; the official code drops whole windows.
    The more attended half is that of the mean of a query group, not of each query head. Prompts of less than twice the
    budget are split evenly, as PyramidKV's are.

    Args:
      budget: tokens per KV head on average over the layers, the suffix included (not so in the official code).
      strategy: "max" or "average".
      suffix: observed queries at the end of the prompt, kept in every layer; None: 32 for "max", 16 for "average".
      window: tokens of a window.
      group: layers that keep the same tokens.
      beta: the last group keeps `1 / beta` of the average beside the suffix (14 / 8 in the official code).

    Raises:
      ValueError: another strategy, or a budget that cannot hold the suffix.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be 'max' or 'average', got {strategy!r}.")
    if suffix is None:
        suffix = 32 if strategy == "max" else 16
    top = max(window // 2, 1) if strategy == "max" else None
    scorer = over_heads(in_blocks(window_attention(suffix, kernel=1), window, top))
    return at_prefill_end(evict(scorer, budget, recent=suffix, layers=pyramid(beta, group), reuse=group))
