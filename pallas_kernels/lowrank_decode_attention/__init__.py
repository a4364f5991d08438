"""Attention of a few queries over slots that are coordinates of keys from before their rotation."""

from pallas_kernels.lowrank_decode_attention.api import lowrank_decode_attention

__all__ = ["lowrank_decode_attention"]
