"""Segments: sets of slots in one representation. Each knows how to attend."""

from kvjax.segments.buffered import BufferedSegment
from kvjax.segments.compensated import CompensatedSegment
from kvjax.segments.dense import DenseSegment
from kvjax.segments.heads import HeadsSegment
from kvjax.segments.latent import LatentSegment
from kvjax.segments.protocol import Queries, Ranks, Segment
from kvjax.segments.quantized import QuantizedSegment
from kvjax.segments.ragged import RaggedSegment

__all__ = [
    "BufferedSegment",
    "CompensatedSegment",
    "DenseSegment",
    "HeadsSegment",
    "LatentSegment",
    "QuantizedSegment",
    "Queries",
    "RaggedSegment",
    "Ranks",
    "Segment",
]
