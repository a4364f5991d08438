"""APE: contexts that were read in parallel, attended to as if they had been read one after the other.

Yang et al. "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding". 2025.
arXiv:2502.05431.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.cache import Cache
from kvjax.reuse.material import joined, tempered


def ape(prefix: Cache, contexts: Sequence[Cache], *, temperature: float = 0.9, factor: float = 0.9) -> Cache:
    """Puts contexts behind a prefix, all at the same positions, for a question to be read behind them (`before`).

    The contexts' part of attention has the temperature T and the log-sum-exp `factor * T * lse`; the prefix and what
    follows have none. The question comes behind the longest context. With one context, T = 1 and factor = 1 this is
    the prefill of prefix and context.

    Deviations: none known; the paper tunes T and factor on a task, the defaults are of its code.

    Args:
      prefix: what all contexts were read behind: at least the first tokens, which attention sinks into.
      contexts: each read behind `before(prefix)` and `detached` from it.
      temperature: T, at most 1 sharpens attention to the contexts.
      factor: S.

    Raises:
      ValueError: there is no context, or rows or layers differ; see `tempered`.
    """
    return joined(prefix, tempered(joined(*contexts), temperature, factor))
