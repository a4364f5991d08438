"""Attention of a few queries over packed, quantized slots."""

from pallas_kernels.quantized_decode_attention.api import quantized_decode_attention

__all__ = ["quantized_decode_attention"]
