"""Compactor: keys that stand out, and tokens that their neighbourhood attends to; no question is looked at.

Chari, Van Durme. "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores". 2025.
arXiv:2507.08143.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import blend, leverage, noncausal_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def compactor(
    budget: Budget = 0.5,
    blending: float | None = None,
    sketch: int = 48,
    chunk: int = 256,
    sinks: int = 8,
    recent: int = 4,
    seed: int = 0,
) -> CacheTransform:
    """Keeps, per KV head, the tokens of highest `blending * z(leverage) + z(non-causal attention)`.

    z takes off the mean over a row's layer, and divides by the deviation. See `kvjax.scores.leverage` and
    `kvjax.scores.noncausal_attention`.

    Deviations: as in kvpress, leverage is solved with a Cholesky factor, with a larger multiple of the identity, and
    blending follows the budget; the paper calibrates it for each context, and the rate with it. Non-causal attention is
    scaled as the model's is, and padding takes no part in it; kvpress does neither. Its chunks begin at multiples of
    `chunk`; in kvpress the first begins after the sinks. The newest tokens are kept, but take part in the
    scores of others.

    Bytes: 4 a slot beside those of the kept tokens, for the attention that is noted while the prompt arrives.

    Args:
      budget: tokens per KV head.
      blending: weight of leverage; None: the fraction that is dropped, or 0.35 where the budget is a count.
      sketch: columns of the random matrix that keys are multiplied by.
      chunk: tokens that attend to each other.
      sinks: first tokens, always kept.
      recent: newest tokens, always kept.
      seed: of the random matrices.
    """
    if blending is None:
        blending = 1 - budget if isinstance(budget, float) else 0.35
    scorer = blend([(blending, leverage(sketch, sinks, seed)), (1.0, noncausal_attention(chunk, sinks))], "deviation")
    return at_prefill_end(evict(scorer, budget, sinks=sinks, recent=recent))
