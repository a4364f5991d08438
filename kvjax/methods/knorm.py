"""Knorm: keep the keys of smallest norm.

Devoto, Zhao, Scardapane, Minervini. "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression".
EMNLP 2024. arXiv:2406.11430.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import negative_key_norm
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def knorm(budget: Budget = 0.5) -> CacheTransform:
    """Keeps, per KV head, the tokens whose keys have the smallest L2 norm.

    Deviation: every layer is compressed; the paper leaves the first two alone for some tasks.

    Args:
      budget: tokens per KV head.
    """
    return at_prefill_end(evict(negative_key_norm(), budget))
