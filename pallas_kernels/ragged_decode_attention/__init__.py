"""Attention of a few queries over pages that belong to KV heads."""

from pallas_kernels.decode_attention.pages import PageRun, over_pages
from pallas_kernels.ragged_decode_attention.api import ragged_decode_attention

__all__ = ["PageRun", "over_pages", "ragged_decode_attention"]
