"""Causal self-attention of a prompt over chosen blocks of its keys."""

from pallas_kernels.block_attention.api import block_attention

__all__ = ["block_attention"]
