"""Hydragen: attention to a prompt that a batch shares, in one product for all of it.

Juravsky et al. "Hydragen: High-Throughput LLM Inference with Shared Prefixes". 2024. arXiv:2402.05099.
"""

from __future__ import annotations

from kvjax.cache import Cache
from kvjax.transforms.base import CacheTransform, chain, identity
from kvjax.transforms.before import before


def hydragen(*levels: Cache, method: CacheTransform | None = None) -> CacheTransform:
    """Attaches shared prompts, the root of the tree first, before rows with prompts of their own; exact.

    Queries of all rows of a group attend to its prompt at once, and the parts are merged by their log-sum-exp.

    Deviations: none known. A level that was read behind the one above it holds that too: pass the last alone then.

    Args:
      *levels: caches of b rows each, b a divisor of the batch; positions follow each other (`reuse.moved`).
      method: what compresses the rows' own prompts; None: nothing does.

    Raises:
      ValueError: see `kvjax.before`.
    """
    return chain(*map(before, levels), identity() if method is None else method)
