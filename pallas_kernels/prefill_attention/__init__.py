"""Causal self-attention of a chunk of new tokens."""

from pallas_kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
