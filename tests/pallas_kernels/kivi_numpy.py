"""KIVI's quantizer in float64 NumPy, transcribed from the paper and its `quant/new_pack.py`."""

from __future__ import annotations

import numpy as np


def kivi_quantizer(x: np.ndarray, bits: int, group: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """KIVI, section 3: min/max along groups, `q = round((x - min) / scale)`, `scale = (max - min) / (2**bits - 1)`.

    Args:
      x: [B, K, S, H].
      bits: of a code.
      group: entries that share a scale.
      axis: 2 for keys, grouped along tokens; 3 for values, grouped along channels.

    Returns:
      The codes before rounding, and what they dequantize to when rounded.
    """
    x = np.moveaxis(x.astype(np.float64), axis, -1)
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    lowest, highest = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scale = (highest - lowest) / (2**bits - 1)
    exact = (groups - lowest) / scale
    restored = np.clip(np.rint(exact), 0, 2**bits - 1) * scale + lowest
    back = lambda y: np.moveaxis(y.reshape(x.shape), -1, axis)
    return back(exact), back(restored)
