"""TidalDecode: two layers find the tokens that matter, the others read those.

Yang, Zhang, Chen, Li, Jia. "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention".
ICLR 2025. arXiv:2410.05076.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.budget import Budget
from kvjax.segments.indices import Exact
from kvjax.transforms import CacheTransform, select


def tidaldecode(read: Budget = 256, select_at: Sequence[int] = (2, 13), each: int = 8) -> CacheTransform:
    """Stores everything; layers `select_at` attend to all of it, and those after them to the tokens they found highest.

    Layers before the first attend to everything. Bytes read in a step of L layers: about `(a T + (L - a) read) / (L T)`
    of what is stored, a being the layers that attend to everything; the keys of selecting layers count twice, once to
    choose and once to attend.

    Deviations: the heads of a group read the same tokens, those of the highest logit of any of them; the newest tokens,
    up to 16, are always read, and count; keys and values of tokens that were decoded this way are not computed again.

    Args:
      read: tokens per KV head that the other layers read.
      select_at: layers that choose (the second one differs from model to model).
      each: calls of at most so many tokens choose for each; longer ones read everything.
    """
    return select(Exact(), read, page=1, choose_at=select_at, each=each)
