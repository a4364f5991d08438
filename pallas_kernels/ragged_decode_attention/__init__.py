"""Attention of a few queries over pages that belong to KV heads."""

from pallas_kernels.ragged_decode_attention.api import PageRun, ragged_decode_attention
from pallas_kernels.ragged_decode_attention.page_run import over_pages

__all__ = ["PageRun", "over_pages", "ragged_decode_attention"]
