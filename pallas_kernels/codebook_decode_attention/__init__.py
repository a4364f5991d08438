"""Attention of a few queries over slots that are codes of centroids."""

from pallas_kernels.codebook_decode_attention.api import codebook_decode_attention

__all__ = ["codebook_decode_attention"]
