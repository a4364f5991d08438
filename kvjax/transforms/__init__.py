"""Transforms: pairs of pure functions that rewrite a cache, and when they act."""

from kvjax.transforms.attend_prompt import attend_prompt
from kvjax.transforms.balance import balance_channels, order_channels, separate_values, smooth_channels
from kvjax.transforms.base import CacheTransform, chain, check_step, identity
from kvjax.transforms.before import before
from kvjax.transforms.cast import cast
from kvjax.transforms.center import center_keys
from kvjax.transforms.convolve import convolve
from kvjax.transforms.evict import Scorer, evict
from kvjax.transforms.evict_across_layers import evict_across_layers
from kvjax.transforms.evict_by_head import adaptive, evict_by_head
from kvjax.transforms.layer_budgets import by_coverage, by_variance, pyramid, whole_layers
from kvjax.transforms.learned import learned
from kvjax.transforms.merge import MergeRule, merge
from kvjax.transforms.merge_layers import merge_layers
from kvjax.transforms.merge_rules import into_nearest, into_neighbour, into_next, into_runs, into_similar
from kvjax.transforms.prefix import prefix
from kvjax.transforms.product_quantize import product_quantize
from kvjax.transforms.project import (
    HeadBases,
    by_rank,
    project,
    project_by_group,
    project_by_head,
    project_jointly,
    prune_channels,
    rotate_channels,
)
from kvjax.transforms.protect import protect
from kvjax.transforms.quantize import quantize, store
from kvjax.transforms.quantize_by_age import quantize_by_age
from kvjax.transforms.quantize_corrected import quantize_corrected
from kvjax.transforms.quantize_levels import quantize_levels
from kvjax.transforms.reindex import reindex
from kvjax.transforms.ring import ring
from kvjax.transforms.schedule import Observer, Schedule
from kvjax.transforms.select import low_rank_keys, select
from kvjax.transforms.share_basis import share_basis
from kvjax.transforms.share_layers import share_layers
from kvjax.transforms.sliding_windows import bounded_layers, respect_windows
from kvjax.transforms.split_heads import split_heads
from kvjax.transforms.split_slots import split_slots
from kvjax.transforms.when import at_prefill_end, every, every_chunk, every_step, from_first_chunk, when_full

__all__ = [
    "CacheTransform",
    "HeadBases",
    "MergeRule",
    "Observer",
    "Schedule",
    "Scorer",
    "adaptive",
    "at_prefill_end",
    "attend_prompt",
    "balance_channels",
    "before",
    "bounded_layers",
    "by_coverage",
    "by_rank",
    "by_variance",
    "cast",
    "center_keys",
    "chain",
    "check_step",
    "convolve",
    "every",
    "every_chunk",
    "every_step",
    "from_first_chunk",
    "evict",
    "evict_across_layers",
    "evict_by_head",
    "identity",
    "into_nearest",
    "into_neighbour",
    "into_next",
    "into_runs",
    "into_similar",
    "learned",
    "low_rank_keys",
    "merge",
    "merge_layers",
    "order_channels",
    "prefix",
    "product_quantize",
    "project",
    "project_by_group",
    "project_by_head",
    "project_jointly",
    "protect",
    "prune_channels",
    "pyramid",
    "quantize",
    "quantize_by_age",
    "quantize_corrected",
    "quantize_levels",
    "reindex",
    "respect_windows",
    "ring",
    "rotate_channels",
    "select",
    "separate_values",
    "share_basis",
    "share_layers",
    "smooth_channels",
    "split_heads",
    "split_slots",
    "store",
    "when_full",
    "whole_layers",
]
