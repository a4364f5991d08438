"""CSKV: a low-rank cache of all heads of a layer, beside a window of exact tokens.

Wang, Zhao, Ning, Li, Wu, Wang. "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios".
2024. arXiv:2409.10593.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.segments.latent import Matrix
from kvjax.transforms import CacheTransform, at_prefill_end, project_jointly


def cskv(
    calibration: Mapping[str, jax.Array],
    key_density: float = 0.5,
    value_density: float = 0.5,
    window: int = 32,
) -> CacheTransform:
    """Stores un-rotated keys, and values, as `density K H` coordinates a token; the newest tokens stay exact.

    The coordinates are those of the activation-aware SVD of the key and value projections, which the paper
    starts its training from: with `S W = U Z V^T`, projecting `x W` on V is what its `x A` stores, up to scale.

    Deviations: untrained; exact tokens wait for a block of `window` instead of leaving one by one, and are
    stored once instead of in both branches.

    Args:
      calibration: of `experiments.calibrate --method=cskv`: `key_axes`, `value_axes` f32[L, K, H, K * H], columns
        by falling singular value.
      key_density: coordinates of a token's keys over all heads, as a fraction of K H.
      value_density: the same for values.
      window: tokens that are exact at most.

    Raises:
      ValueError: a density outside (0, 1].
    """
    width = calibration["key_axes"].shape[-1]
    for name, density in (("key_density", key_density), ("value_density", value_density)):
        if not 0 < density <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {density}.")
    key_rank, value_rank = (max(1, int(density * width)) for density in (key_density, value_density))
    bases = [
        (Matrix(key[None, :, :, :key_rank]), Matrix(value[None, :, :, :value_rank]))
        for key, value in zip(calibration["key_axes"], calibration["value_axes"], strict=True)
    ]
    return at_prefill_end(project_jointly(bases, window=window))
