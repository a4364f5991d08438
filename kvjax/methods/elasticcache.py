"""Elastic Cache: dropped tokens are averaged into their kept neighbours, the same ones in every head.

Liu, Liu, Wang, Dong, Chen, Rao, Krishna, Lu. "Efficient Inference of Vision Instruction-Following Models with Elastic
Cache". ECCV 2024. arXiv:2407.18121.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention, over_heads
from kvjax.transforms import CacheTransform, at_prefill_end, into_neighbour, merge


def elasticcache(
    budget: Budget = 0.8, sinks: int = 1, recent: int = 1, log_count: bool = False
) -> CacheTransform:
    """Keeps the tokens with most attention over the prompt; each of the others goes to the nearest that is kept.

    Deviations: the paper's rule, not that of its code, which takes ranks for tokens and shifts evicted ones by the
    sinks. It acts when the prompt is in; the code goes on to drop a token at a fixed place at every step. Keys are
    averaged rotated, at the position of the kept token.

    Bytes: 4 a slot beside those of the kept tokens, for the attention that is added up while the prompt arrives.

    Args:
      budget: tokens per KV head, the same ones in every head of a layer (the code's scripts drop a fifth).
      sinks: first tokens, always kept.
      recent: newest tokens, always kept.
      log_count: weigh a merged token by how many it stands for; not in the paper.
    """
    scorer = over_heads(accumulated_attention())
    how = dict(sinks=sinks, recent=recent, log_count=log_count)
    return at_prefill_end(merge(scorer, budget, into_neighbour(), **how))
