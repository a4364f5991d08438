"""Segments: sets of slots in one representation. Each knows how to attend."""

from kvjax.segments.buffered import BufferedSegment
from kvjax.segments.dense import DenseSegment
from kvjax.segments.protocol import Queries, Ranks, Segment
from kvjax.segments.quantized import QuantizedSegment

__all__ = ["BufferedSegment", "DenseSegment", "QuantizedSegment", "Queries", "Ranks", "Segment"]
