"""vAttention: memory for tokens as they come, in pages, with keys and values contiguous.

Prabhu et al. "vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention". 2024. arXiv:2405.04437.
"""

from __future__ import annotations

import dataclasses

from kvjax.drivers import Run


def grown(run: Run, tokens: int, *, bucket: int = 256) -> Run:
    """Makes room for `tokens` more tokens in a run, in whole buckets: all that was read stays where it is.

    A cache has static shapes, so each growth is a program of its own to compile and a copy of the cache; with buckets
    these are few. At most `bucket - 1` slots of a head are beyond what was asked for.

    Deviations: the paper maps physical pages behind a virtual range while other kernels run, and nothing is copied.

    Args:
      run: outside of loops, with a method that does not bound its cache.
      tokens: at least 1.
      bucket: slots that are added together.

    Raises:
      ValueError: tokens or bucket is below 1, or the method frees slots by itself.
    """
    if tokens < 1 or bucket < 1:
        raise ValueError(f"tokens and bucket must be at least 1, got {tokens} and {bucket}.")
    if run.room.total is None:
        raise ValueError(f"{run.room.method} frees slots as tokens come; its runs need no more room.")
    more = -(-tokens // bucket) * bucket
    return run._replace(
        cache=run.cache.reserve(more).constrained(), room=dataclasses.replace(run.room, total=run.room.total + more)
    )
