"""Codecs: how the keys, or the values, of slots are stored. Each is one file, and every layout takes any of them."""

from kvjax.codecs.affine import Affine
from kvjax.codecs.corrected import Corrected
from kvjax.codecs.encoded import (
    Encoded,
    Stored,
    block_of,
    by_slot,
    decode,
    encode_like,
    fields_of,
    is_array,
    leaf_and_gain,
    named_axes,
    store,
)
from kvjax.codecs.halves import Fourier, Halves
from kvjax.codecs.levels import Levels
from kvjax.codecs.mean_levels import MeanLevels
from kvjax.codecs.mid_range import MidRange
from kvjax.codecs.norm import Scaled, UnitNorm
from kvjax.codecs.pairs import Pairs
from kvjax.codecs.product import Product
from kvjax.codecs.sketch import SignSketch
from kvjax.codecs.sparse import Sparse

__all__ = [
    "Affine",
    "Corrected",
    "Encoded",
    "Fourier",
    "Halves",
    "Levels",
    "MeanLevels",
    "MidRange",
    "Pairs",
    "Product",
    "Scaled",
    "SignSketch",
    "Sparse",
    "Stored",
    "UnitNorm",
    "block_of",
    "by_slot",
    "decode",
    "encode_like",
    "fields_of",
    "is_array",
    "leaf_and_gain",
    "named_axes",
    "store",
]
