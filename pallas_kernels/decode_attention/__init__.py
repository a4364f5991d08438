"""Attention of a few queries over slots, whatever they are stored as."""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.pages import PageRun, Pages
from pallas_kernels.decode_attention.rotation import Rotation

__all__ = ["PageRun", "Pages", "Rotation", "decode_attention"]
