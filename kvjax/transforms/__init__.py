"""Transforms: pairs of pure functions that rewrite a cache, and when they act."""

from kvjax.transforms.base import CacheTransform, chain, check_step, identity
from kvjax.transforms.cast import cast
from kvjax.transforms.evict import Scorer, evict, pyramid
from kvjax.transforms.evict_by_head import adaptive, evict_by_head
from kvjax.transforms.project import HeadBases, by_rank, project, project_by_head, project_jointly, prune_channels
from kvjax.transforms.quantize import quantize
from kvjax.transforms.ring import ring
from kvjax.transforms.split_heads import split_heads
from kvjax.transforms.when import at_prefill_end, every, every_chunk, every_step, when_full

__all__ = [
    "CacheTransform",
    "HeadBases",
    "Scorer",
    "adaptive",
    "at_prefill_end",
    "by_rank",
    "cast",
    "chain",
    "check_step",
    "every",
    "every_chunk",
    "every_step",
    "evict",
    "evict_by_head",
    "identity",
    "project",
    "project_by_head",
    "project_jointly",
    "prune_channels",
    "pyramid",
    "quantize",
    "ring",
    "split_heads",
    "when_full",
]
