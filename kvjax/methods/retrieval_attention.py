"""RetrievalAttention: sinks and the newest tokens, and of all others the keys nearest to the query.

Liu, Chen, Lu, Jiang, Han, Zhang, Chen, Zhang, Ding, Zhang, Chen, Yang, Yang, Qiu. "RetrievalAttention: Accelerating
Long-Context LLM Inference via Vector Retrieval". 2024. arXiv:2409.10516.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.segments.indices import Exact
from kvjax.transforms import CacheTransform, select


def retrieval_attention(
    read: Budget = 2048, sinks: int = 128, recent: int = 512, each: int = 8
) -> CacheTransform:
    """Stores everything; a query reads the first and the newest tokens, and those with the highest logits.

    Deviations: the search is exact, over all keys, where the paper's index of the prompt's queries scans 1 to 3% of
    them; it is the upper bound of what such an index finds, and reads every key. The heads of a group read the same
    tokens, those of the highest logit of any of them.

    Args:
      read: tokens per KV head that a query reads, sinks and newest ones included.
      sinks: first tokens that are always read.
      recent: newest tokens that are always read.
      each: calls of at most so many tokens choose for each; longer ones read everything.
    """
    return select(Exact(), read, page=1, sinks=sinks, recent=recent, dense_layers=(), each=each)
