"""ShadowKV: low-rank keys, and values of which a query reads the chunks whose mean key it is nearest to.

Sun, Chang, Bao, Zheng, Zheng, Liu, Dong, Chi, Chen. "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM
Inference". ICML 2025. arXiv:2410.21465.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.budget import Budget
from kvjax.segments.indices import MeanKey
from kvjax.transforms import CacheTransform, low_rank_keys, select


def shadowkv(
    read: Budget = 2048,
    rank: int | float = 0.5,
    page: int = 8,
    outliers: int = 48,
    recent: int = 32,
    dense_layers: Sequence[int] = (),
    each: int = 8,
) -> CacheTransform:
    """Stores un-rotated keys as `rank` coordinates; a query reads the chunks of highest `softmax(q m / sqrt(H))`.

    The landmark m is the mean of a chunk's rotated keys; the scores of a group are joined by their maximum. Chunks that
    their landmark tells least of (the lowest cosine of a key in it) are always read. Chosen keys are expanded and
    rotated as they are read.

    Deviations: each KV head is factored by itself, so its rank is of H channels (the paper factors all heads together,
    160 of 8 * 128); outlier chunks have low-rank keys as others have; what is generated is stored in the same basis;
    values are on the device.

    Args:
      read: tokens per KV head that a query reads, outliers and the newest included.
      rank: coordinates of a key, as a count or as a fraction of H.
      page: tokens of a chunk.
      outliers: chunks that are always read.
      recent: newest tokens that are always read.
      dense_layers: layers that read everything.
      each: calls of at most so many tokens choose for each; longer ones read everything.
    """
    index = MeanKey(agree="softmax_max", outliers=outliers)
    how = dict(page=page, residual=page, recent=recent, dense_layers=dense_layers, each=each)
    return select(index, read, key_rope="at_attend", encode=low_rank_keys(rank), **how)
