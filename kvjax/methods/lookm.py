"""LOOK-M: dropped tokens are merged into the kept one of most similar key.

Wan, Wu, Liu, Huang, Zhu, Jin, Wang, Yuan. "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal
Long-Context Inference". EMNLP 2024 (Findings). arXiv:2406.18139.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention
from kvjax.transforms import CacheTransform, at_prefill_end, into_similar, merge
from kvjax.transforms.merge_rules import Weigh


def lookm(
    budget: Budget = 0.2,
    recent: Budget = 0.5,
    weigh: Weigh = "pivot",
    sinks: int = 4,
    log_count: bool = False,
) -> CacheTransform:
    """Keeps the newest and the most attended tokens of the prompt; each of the others goes to the most similar of them.

    Deviations: the paper keeps all text and chooses among the tokens of images; here nothing says what is an image, and
    all tokens are chosen among, as in the variants of its code without text. Merging by similarity divides by the sum
    of its weights, which the code does not, and each head decides by itself what is similar enough. Scores are
    averaged over a query group. Keys are averaged rotated, at the position of the kept token.

    Bytes: 4 a slot beside those of the kept tokens, for the attention that is added up while the prompt arrives.

    Args:
      budget: tokens per KV head (the paper's default: 0.1 heavy and 0.1 recent).
      recent: share of the budget (float) or tokens (int) given to the newest.
      weigh: "mean" (the paper's averaged merging), "pivot" (pivotal, its default) or "similarity" (weighted); see
        `kvjax.into_similar`.
      sinks: first tokens, always kept.
      log_count: weigh a merged token by how many it stands for; not in the paper.
    """
    how = dict(sinks=sinks, recent=recent, log_count=log_count)
    return at_prefill_end(merge(accumulated_attention(), budget, into_similar(weigh), **how))
