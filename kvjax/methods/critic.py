"""CRITIC: tokens by how much attention they receive, and from how many.

Srinivas, Das, Gupta, Runkana. "Scaling Test-Time Inference with Policy-Optimized, Dynamic Retrieval-Augmented
Generation via KV Caching and Decoding", appendix A. 2025. arXiv:2504.01281.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention, accumulated_entropy, blend, over_heads
from kvjax.transforms import CacheTransform, every_step, evict


def critic(
    budget: Budget = 0.5, attention: float = 0.5, entropy: float = 0.5, recent: Budget = 0.25
) -> CacheTransform:
    """Keeps, at every step, the tokens of highest `attention * A + entropy * E`, the same ones in every head.

    A is the attention a token has received, E the entropy of what it received from each query; both are averaged over
    heads and then scaled to [0, 1] over what the layer holds.

    Deviations: there is no official code. As printed, the attention of a token is the sum over what its query gives,
    which is one, and its entropy that of what its query gives; here both are of what the token receives. The paper's
    third term, a gradient by keys and values, is left out. Its weights are not given. The newest tokens, which have
    received little so far, are kept in any case; the paper says nothing of them. The ratio does not follow the memory
    that is free.

    Args:
      budget: tokens per KV head, as a count or as a fraction of the prompt (the paper drops 10% to 50%).
      attention: weight of attention.
      entropy: weight of entropy.
      recent: share of the budget (float) or tokens (int) given to the newest.

    Raises:
      ValueError: a weight below 0, or both 0.
    """
    if min(attention, entropy) < 0 or attention + entropy == 0:
        raise ValueError(f"attention and entropy must be at least 0, and not both 0, got {attention} and {entropy}.")
    parts = [(attention, over_heads(accumulated_attention())), (entropy, over_heads(accumulated_entropy()))]
    return every_step(evict(blend(parts, "range"), budget, recent=recent))
