"""Random eviction: the floor that every score must beat."""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import random
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def random_eviction(budget: Budget = 0.5, seed: int = 0) -> CacheTransform:
    """Keeps, per KV head, tokens drawn without replacement.

    Args:
      budget: tokens per KV head.
      seed: of the draw; a token's fate depends on nothing else but its layer, head and position.
    """
    return at_prefill_end(evict(random(seed), budget))
