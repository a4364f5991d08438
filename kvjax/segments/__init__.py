"""Segments: sets of slots in one representation. Each knows how to attend."""

from kvjax.segments.buffered import BufferedSegment
from kvjax.segments.codebook import CodebookSegment
from kvjax.segments.compensated import CompensatedSegment
from kvjax.segments.corrected import CorrectedSegment
from kvjax.segments.dense import DenseSegment
from kvjax.segments.heads import HeadsSegment
from kvjax.segments.latent import LatentSegment
from kvjax.segments.pooled import PooledSegment, PoolView
from kvjax.segments.protocol import LayerView, Queries, Ranks, Rewrite, Segment
from kvjax.segments.quantized import QuantizedSegment
from kvjax.segments.ragged import RaggedSegment
from kvjax.segments.shared import ScaledSegment, SharedView

__all__ = [
    "BufferedSegment",
    "CodebookSegment",
    "CompensatedSegment",
    "CorrectedSegment",
    "DenseSegment",
    "HeadsSegment",
    "LatentSegment",
    "LayerView",
    "PoolView",
    "PooledSegment",
    "QuantizedSegment",
    "Queries",
    "RaggedSegment",
    "Ranks",
    "Rewrite",
    "ScaledSegment",
    "Segment",
    "SharedView",
]
