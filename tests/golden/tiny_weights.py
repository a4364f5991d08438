"""Weights of tiny checkpoints, drawn from the names of their tensors, and the tokens that are read with them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

VOCAB = 64
_IDS = np.random.PCG64(7).random_raw(53) % (VOCAB - 3) + 3  # bit generators keep their streams between versions
ROWS = [_IDS[:30].astype(int).tolist(), _IDS[30:].astype(int).tolist()]
"""Two rows of 30 and 23 tokens, the last ten of which are decoded one by one."""


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """f32 tensors by name: matrices uniform with variance 2 / fan_in, vectors in [0.5, 1.5], biases around 0."""
    return {name: _draw(name, tuple(shape)) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    uniform = uniform.reshape(shape)
    if len(shape) > 1:
        return uniform * np.float32((24.0 / shape[-1]) ** 0.5)
    return uniform if name.endswith("bias") else uniform + np.float32(1.0)
