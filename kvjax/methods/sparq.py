"""SparQ: the strongest channels of a query tell which tokens to read. InstInfer's attention, too.

Ribar, Chelombiev, Hudlass-Galley, Blake, Luschi, Orr. "SparQ Attention: Bandwidth-Efficient LLM Inference". ICML 2024.
arXiv:2312.04985. Pan, Li, Li, Liang, et al. "InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context
LLM Inference". 2024. arXiv:2409.04992.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.budget import Budget
from kvjax.segments.indices import StrongChannels
from kvjax.transforms import CacheTransform, select


def sparq(
    read: Budget = 128, r: int = 32, recent: int = 64, dense_layers: Sequence[int] = (), each: int = 8
) -> CacheTransform:
    """Stores everything, and the keys a second time, channel by channel, of which a query reads its r strongest.

    Tokens are ranked by `softmax(q_r k_r / tau)`, averaged over the heads of a group, with
    `tau = sqrt(H |q_r|_1 / |q|_1)`. Bytes stored: half as much again.

    Deviations: what is not read is left out, where the paper gives its weight to the mean value; the heads of a group
    choose their channels together.

    Args:
      read: tokens per KV head that a query reads.
      r: channels that choose them, at most H.
      recent: newest tokens that are always read, within `read`.
      dense_layers: layers that read everything.
      each: calls of at most so many tokens choose for each; longer ones read everything.
    """
    index = StrongChannels(r=r, agree="softmax_mean")
    return select(index, read, page=1, recent=recent, dense_layers=dense_layers, each=each)
