"""Transforms: pairs of pure functions that rewrite a cache, and when they act."""

from kvjax.transforms.base import CacheTransform, chain, check_step, identity
from kvjax.transforms.evict import Scorer, evict
from kvjax.transforms.quantize import quantize
from kvjax.transforms.ring import ring
from kvjax.transforms.when import at_prefill_end, every, every_chunk, every_step, when_full

__all__ = [
    "CacheTransform",
    "Scorer",
    "at_prefill_end",
    "chain",
    "check_step",
    "every",
    "every_chunk",
    "every_step",
    "evict",
    "identity",
    "quantize",
    "ring",
    "when_full",
]
