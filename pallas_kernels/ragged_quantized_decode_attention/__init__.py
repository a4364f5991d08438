"""Attention of a few queries over packed pages that belong to KV heads."""

from pallas_kernels.ragged_quantized_decode_attention.api import (
    as_pages,
    in_a_row,
    ragged_quantized_decode_attention,
)

__all__ = ["as_pages", "in_a_row", "ragged_quantized_decode_attention"]
