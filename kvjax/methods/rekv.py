"""ReKV: blocks of a stream are read again where their mean key, before its rotation, is near to the question.

Di, Yu, Zhang, Li, Zhong, Cheng, Li, He, Lin, Jiang. "Streaming Video Question-Answering with In-context Video KV-Cache
Retrieval". ICLR 2025. arXiv:2503.00540.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.segments.indices import MeanKey
from kvjax.transforms import CacheTransform, select


def rekv(read: Budget = 0.25, page: int = 64, sinks: int = 64, recent: int = 64, each: int = 8) -> CacheTransform:
    """Stores un-rotated keys; a query reads the blocks of highest `<q, mean k>`, both before their rotation.

    All heads of a layer read the same blocks: scores are summed over them, as over the channels of one long vector.

    Deviations: this is the part that concerns text: blocks are `page` tokens, where the paper's are frames of 196;
    every token of an answer chooses for itself, where the paper chooses once by the mean of a question's queries; keys
    are rotated at the positions they had, where the paper numbers what was chosen anew; a prompt attends to all of
    itself, where a stream attends to a window of 15,000 tokens.

    Args:
      read: tokens per KV head that a query reads.
      page: tokens of a block.
      sinks: first tokens that are always read.
      recent: newest tokens that are always read.
      each: calls of at most so many tokens choose for each; longer ones read everything.
    """
    index = MeanKey(agree="sum", raw=True, all_heads=True)
    how = dict(page=page, residual=page, sinks=sinks, recent=recent, dense_layers=(), each=each)
    return select(index, read, key_rope="at_attend", **how)
