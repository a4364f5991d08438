"""Attention of a few queries over pages, each of which belongs to one KV head."""

from pallas_kernels.ragged_decode_attention.api import ragged_decode_attention

__all__ = ["ragged_decode_attention"]
