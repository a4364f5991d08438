"""Segments: slots in any codec, and the layouts that put them together. Each knows how to attend."""

from kvjax.segments.blocked import BlockedSegment
from kvjax.segments.compensated import CompensatedSegment
from kvjax.segments.edits import Edit
from kvjax.segments.heads import HeadsSegment
from kvjax.segments.latent import LatentSegment
from kvjax.segments.layouts import Ring, Rows
from kvjax.segments.pooled import PooledSegment, PoolView
from kvjax.segments.protocol import AnySegment, LayerView, Queries, Ranks, Rewrite
from kvjax.segments.ragged import RaggedSegment
from kvjax.segments.segment import Segment
from kvjax.segments.selected import SelectedSegment
from kvjax.segments.shared import ScaledView, SharedView, SlotsView
from kvjax.segments.tempered import TemperedSegment

__all__ = [
    "AnySegment",
    "BlockedSegment",
    "CompensatedSegment",
    "Edit",
    "HeadsSegment",
    "LatentSegment",
    "LayerView",
    "PoolView",
    "PooledSegment",
    "Queries",
    "RaggedSegment",
    "Ranks",
    "Rewrite",
    "Ring",
    "Rows",
    "ScaledView",
    "Segment",
    "SelectedSegment",
    "SharedView",
    "SlotsView",
    "TemperedSegment",
]
