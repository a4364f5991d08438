"""MInference: a prompt reads an A-shape, columns and diagonals, or blocks of its keys; each head has its pattern.

Jiang, Li, Zhang, Wu, Luo, Ahn, Han, Abdi, Li, Lin, Yang, Qiu. "MInference 1.0: Accelerating Pre-filling for
Long-Context LLMs via Dynamic Sparse Attention". NeurIPS 2024. arXiv:2407.02490.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from kvjax.line_choices import ByPattern, Corner, Lines, PooledBlocks
from kvjax.prompt_attention import Choice
from kvjax.transforms import CacheTransform, attend_prompt

_KINDS = Corner, Lines, PooledBlocks


def pattern(kind: int, first: int, second: int) -> Choice:
    """Returns one of the candidates of a calibration.

    Args:
      kind: 0: `Corner` of `first` tokens and the `second` nearest; 1: `Lines`, `first` columns and `second` diagonals;
        2: `PooledBlocks`, `first` blocks.
      first: see above.
      second: see above; of blocks it says nothing.

    Raises:
      ValueError: there is no such kind.
    """
    if kind not in range(len(_KINDS)):
        raise ValueError(f"kind must be 0, 1 or 2, got {kind}.")
    return PooledBlocks(first) if kind == 2 else _KINDS[kind](first, second)


def minference(
    calibration: Mapping[str, jax.Array] | None = None,
    columns: int = 1000,
    diagonals: int = 6096,
    block: int = 64,
    most: float = 1.0,
) -> CacheTransform:
    """Reads for each head the keys that its pattern, found offline, picks for this prompt.

    The patterns: the first tokens and the nearest; the columns and diagonals that the last 64 queries attend to most;
    the blocks whose mean key has the largest product with a block's mean query. The cache keeps everything: chain it
    with a method that compresses.

    Deviations: diagonals are widened to the blocks that they touch, at most two where the official kernel reads one of
    its own place; the nearest tokens of an A-shape likewise. Columns are read key by key, and not again where a block
    holds them. The last tokens of the prompt read everything in the last layer. Of a prompt in chunks, a chunk reads
    everything before it.

    Args:
      calibration: of `experiments.calibrate --method=minference`: `candidates` f32[C, 3], each as `pattern` takes it,
        and `pattern` f32[L, N], the candidate of every query head. None: columns and diagonals in all heads, which is
        what the official code falls back to.
      columns: of a head, without a calibration.
      diagonals: of a head, without a calibration.
      block: tokens of a block.
      most: fraction of the blocks that may be read, see `kvjax.PromptAttention`.

    Raises:
      ValueError: fewer than 30 columns or 50 diagonals, a calibration of something else, or block or most make no
        sense.
    """
    if columns < 30 or diagonals < 50:
        raise ValueError(f"columns must be at least 30 and diagonals at least 50, got {columns} and {diagonals}.")
    if calibration is None:
        return attend_prompt(Lines(columns, diagonals), block=block, most=most)
    candidates, patterns = (np.asarray(calibration[name]).astype(int) for name in ("candidates", "pattern"))
    if patterns.min() < 0 or patterns.max() >= len(candidates):
        raise ValueError(f"calibration: pattern must be from 0 to {len(candidates) - 1}, got {patterns.max()}.")
    used = np.unique(patterns)  # what no head needs is not computed
    choices = tuple(pattern(*candidates[i].tolist()) for i in used)
    rows = tuple(tuple(row) for row in np.searchsorted(used, patterns).tolist())
    return attend_prompt(ByPattern(choices), block=block, most=most, patterns=rows)
