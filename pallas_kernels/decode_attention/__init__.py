"""Attention of a few queries over dense cache slots."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
