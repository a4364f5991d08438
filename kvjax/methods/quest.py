"""Quest: read the pages whose keys may give a query the most.

Tang, Zhao, Zhu, Xiao, Kasikci, Han. "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference". ICML 2024.
arXiv:2406.10774.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.budget import Budget
from kvjax.segments.indices import Bounds
from kvjax.transforms import CacheTransform, select


def quest(
    read: Budget = 1024, page: int = 16, dense_layers: Sequence[int] = (0, 1), each: int = 8
) -> CacheTransform:
    """Stores everything, and lets every query read the pages with the highest bound `sum_d max(q_d M_d, q_d m_d)`.

    M and m are the largest and the smallest key of a page, channel by channel, after the rotation. The newest page is
    always read and counts, as in the official kernels.

    Deviation: the heads of a group read the same pages, those of the highest bound of any of them.

    Args:
      read: tokens per KV head that a query reads.
      page: tokens of a page.
      dense_layers: layers that read everything.
      each: calls of at most so many tokens choose for each; longer ones read everything, as the official code does.
    """
    return select(Bounds(), read, page=page, residual=page, dense_layers=dense_layers, each=each)
