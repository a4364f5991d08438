"""MPCache, both stages: what the end of a prompt looks at is kept, and a query reads a part of that.

Zeng, Dong, Zhou, Ma, Tan, Wang, Li. "MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference".
2025. arXiv:2501.06807.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.methods.mpcache_static import mpcache_static
from kvjax.segments.indices import Bounds
from kvjax.transforms import CacheTransform, chain, select


def mpcache(
    budget: Budget = 0.3, read: Budget = 0.06, last: Budget = 0.2, blend: float = 0.6, page: int = 16
) -> CacheTransform:
    """Keeps tokens as `mpcache_static` does; a query reads the clusters of highest `sum_d blend q M + (1 - blend) q m`.

    M and m are the largest and the smallest key of a cluster of `page` tokens, channel by channel. The first and the
    newest cluster are always read.

    Deviations: the clusters of 32 tokens that are looked at first, of which half are left out, save comparisons and
    not what is read, so there is one level; the heads of a group read the same clusters; the sharing of choices between
    layers, which the paper describes, is absent from its code and here. See `mpcache_static` for the first stage.

    Args:
      budget: tokens per KV head that are kept.
      read: tokens per KV head that a query reads of them (20% of what is kept).
      last: see `mpcache_static`.
      blend: weight of the upper bound.
      page: tokens of a cluster.
    """
    index = Bounds(blend=blend, agree="sum")
    return chain(mpcache_static(budget, last), select(index, read, page=page, residual=page, sinks=1, dense_layers=()))
