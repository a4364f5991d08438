"""Stores slots one by one as their norm and the nearest of a few levels for each channel."""

from __future__ import annotations

from kvjax.codecs import Levels, UnitNorm
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.quantize import store


def quantize_levels(bits: int, value_bits: int | None = None) -> CacheTransform:
    """Stores `x ~ norm * level`, with the levels that lose least of normal numbers; every slot by itself.

    Coordinates of a vector in a random basis are nearly normal (`rotate_channels`); outlier channels of others are not.

    Args:
      bits: 2, 3 or 4 per stored number of a key.
      value_bits: the same for values; None: `bits`.

    Raises:
      ValueError: bits are not 2, 3 or 4.
    """
    codecs = tuple(UnitNorm(Levels.gaussian(b), None) for b in (bits, bits if value_bits is None else value_bits))
    return store("quantize_levels", None, 0, written=codecs, one_by_one=codecs)
