"""Caches as material: what was read once is moved, cut, put together, read again in parts, and forked.

Masks come from positions, so a token that is read again where it was sees what it saw, and is seen by what comes after
it, wherever its slot lies. Each paper that lives of this is one file.
"""

from kvjax.reuse.ape import ape
from kvjax.reuse.cacheblend import cacheblend, staleness
from kvjax.reuse.material import detached, joined, moved, tempered, without
from kvjax.reuse.pie import pie
from kvjax.reuse.prepacking import packed_rows, prepacking
from kvjax.reuse.rewriting import rewrite, rewritten
from kvjax.reuse.rows import cache_rows, taken_rows

__all__ = [
    # What the papers are made of.
    "cache_rows",
    "detached",
    "joined",
    "moved",
    "packed_rows",
    "rewrite",
    "rewritten",
    "taken_rows",
    "tempered",
    "without",
    # Papers.
    "ape",
    "cacheblend",
    "pie",
    "prepacking",
    "staleness",
]
