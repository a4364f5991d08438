"""Attention of a few queries over pages that belong to KV heads."""

from pallas_kernels.ragged_decode_attention.api import PageRun, ragged_decode_attention
from pallas_kernels.ragged_decode_attention.page_run import cut_rows

__all__ = ["PageRun", "cut_rows", "ragged_decode_attention"]
