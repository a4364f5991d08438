"""KeyDiff: keep keys that differ from the average key.

Park, Jones, Morse, Goel, Lee, Lott. "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
Inference in Resource-Constrained Environments". 2025. arXiv:2504.15364.
"""

from __future__ import annotations

from kvjax.scores import key_difference
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def keydiff(budget: int | float = 0.5) -> CacheTransform:
    """Keeps, per KV head, the tokens whose keys have the smallest cosine with the mean of the unit keys.

    Args:
      budget: tokens per KV head.
    """
    return at_prefill_end(evict(key_difference(), budget))
