"""Transforms: pairs of pure functions that rewrite a cache, and when they act."""

from kvjax.transforms.base import CacheTransform, chain, check_step, identity
from kvjax.transforms.cast import cast
from kvjax.transforms.evict import Scorer, evict, pyramid
from kvjax.transforms.evict_by_head import adaptive, evict_by_head
from kvjax.transforms.merge_layers import merge_layers
from kvjax.transforms.project import project, project_jointly, prune_channels
from kvjax.transforms.quantize import quantize
from kvjax.transforms.ring import ring
from kvjax.transforms.share_basis import share_basis
from kvjax.transforms.split_heads import split_heads
from kvjax.transforms.when import at_prefill_end, every, every_chunk, every_step, when_full

__all__ = [
    "CacheTransform",
    "Scorer",
    "adaptive",
    "at_prefill_end",
    "cast",
    "chain",
    "check_step",
    "every",
    "every_chunk",
    "every_step",
    "evict",
    "evict_by_head",
    "identity",
    "merge_layers",
    "project",
    "project_jointly",
    "prune_channels",
    "pyramid",
    "quantize",
    "ring",
    "share_basis",
    "split_heads",
    "when_full",
]
