"""CSKV: a low-rank cache of all heads of a layer, beside a window of exact tokens.

Wang, Zhao, Ning, Li, Wu, Wang. "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios".
2024. arXiv:2409.10593.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.segments.bases import Matrix
from kvjax.transforms import CacheTransform, from_first_chunk, project_jointly


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
    return _joint(calibration, key_density, value_density, window)


def cskv_trained(
    calibration: Mapping[str, jax.Array],
    key_density: float = 0.5,
    value_density: float = 0.5,
    window: int = 32,
) -> CacheTransform:
    """`cskv` with maps to coordinates and back that were trained to give each layer's keys and values back.

    Deviations: those of the recipe, `experiments.recipes.cskv.train_cskv`; the window as in `cskv`.

    Args:
      calibration: of `experiments.train --gin_file=configs/runs/train_cskv.gin`: `key_axes`, `value_axes`
        f32[L, K, H, R] into R coordinates and, transposed, out of them; out of them by `key_inverse`, `value_inverse`
        where it has these.
      key_density, value_density, window: see `cskv`. At most the density that was trained; less takes the first of
        the trained coordinates.

    Raises:
      ValueError: as `cskv`, and a density above the trained one.
    """
    return _joint(calibration, key_density, value_density, window)


def _joint(
    calibration: Mapping[str, jax.Array], key_density: float, value_density: float, window: int
) -> CacheTransform:
    bases = {}
    for name, density in (("key", key_density), ("value", value_density)):
        if not 0 < density <= 1:
            raise ValueError(f"{name}_density must be in (0, 1], got {density}.")
        axes, inverse = calibration[f"{name}_axes"], calibration.get(f"{name}_inverse")
        L, K, H, held = axes.shape
        rank = max(1, int(density * K * H))
        if rank > held:
            raise ValueError(f"{name}_density must be at most {held / (K * H):.3g}, which was trained, got {density}.")
        cut = lambda x, layer: x[layer][None, :, :, :rank]
        bases[name] = [
            Matrix(cut(axes, layer), inverse=None if inverse is None else cut(inverse, layer)) for layer in range(L)
        ]
    return from_first_chunk(project_jointly(list(zip(bases["key"], bases["value"])), window=window))
