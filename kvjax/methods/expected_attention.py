"""Expected Attention: what future queries would attend to, from the moments of those seen.

Devoto, Jeblick, Jegou. "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution". 2025. arXiv:2510.00636.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import future_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def expected_attention(
    budget: Budget = 0.5,
    future: int = 512,
    sinks: int = 4,
    covariance: bool = True,
    value_norm: bool = True,
) -> CacheTransform:
    """Keeps, per KV head, the tokens with the highest expected contribution `E[p] ||v||`.

    Args:
      budget: tokens per KV head.
      future: next positions over which rotations are averaged.
      sinks: first tokens, always kept and left out of the moments.
      covariance: with the second moment of the queries.
      value_norm: with the norm of the values.
    """
    scorer = future_attention(future, sinks, covariance, value_norm)
    return at_prefill_end(evict(scorer, budget, sinks=sinks))
