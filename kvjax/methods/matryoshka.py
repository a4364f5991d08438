"""MatryoshkaKV: keys and values in orthogonal bases of each head, cut to the axes that matter.

Lin, Zeng, Xiao, Kou, Hou, Gao, Zhang, Deng. "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal
Projection". ICLR 2025. arXiv:2410.14731.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from kvjax.segments.bases import Matrix
from kvjax.transforms import CacheTransform, by_rank, from_first_chunk, project_by_head
from kvjax.transforms.project import check_rank


def matryoshka_pca(
    calibration: Mapping[str, jax.Array],
    key_rank: int | float | None = None,
    value_rank: int | float | None = None,
    rate: float = 0.5,
) -> CacheTransform:
    """Projects each head's rotated keys, and values, on their first principal components, new tokens included.

    Attention runs in the reduced space. How many components a head keeps, of keys and of values, is what the greedy
    search of the calibration found for the mean rate; heads of a layer that keep as many are stored together.

    Deviations: the starting point of the paper without its training, and for that reason without its means: cut axes
    about a mean give attention sinks, whose values are nearly zero, a value that is not. The search counts errors
    of what follows an exact prompt.

    Args:
      calibration: of `experiments.calibrate --method=matryoshka_pca`: `key_axes`, `value_axes` f32[L, K, H, H],
        columns by falling mean square; of the search, `rates` f32[n] with `key_ranks`, `value_ranks` [n, L, K]; and,
        where it has them, `key_mean`, `value_mean` f32[L, K, H] to be subtracted.
      key_rank: columns that all heads keep, as a count or as a fraction of H; None: those of the search.
      value_rank: the same for values.
      rate: mean over all heads of what the search keeps, as a fraction of H.

    Raises:
      ValueError: a rank above H, or below one; a rate that the calibration does not have.
    """
    return _projected(calibration, key_rank, value_rank, rate)


def matryoshka_trained(
    calibration: Mapping[str, jax.Array],
    key_rank: int | float | None = None,
    value_rank: int | float | None = None,
    rate: float = 0.5,
) -> CacheTransform:
    """`matryoshka_pca` with axes that were trained so that a head's first R of them serve the model best, for all R.

    Deviations: those of the recipe, `experiments.recipes.matryoshka.train_matryoshka`.

    Args:
      calibration: of `experiments.train --gin_file=configs/runs/train_matryoshka.gin`, in the form of
        `matryoshka_pca`'s.
      key_rank: see `matryoshka_pca`.
      value_rank: see `matryoshka_pca`.
      rate: see `matryoshka_pca`.

    Raises:
      ValueError: as `matryoshka_pca`.
    """
    return _projected(calibration, key_rank, value_rank, rate)


def _projected(
    calibration: Mapping[str, jax.Array], key_rank: int | float | None, value_rank: int | float | None, rate: float
) -> CacheTransform:
    L, K, H, _ = calibration["key_axes"].shape
    ranks = {}
    for name, rank in (("key", key_rank), ("value", value_rank)):
        if rank is None:
            ranks[name] = _searched(calibration, name, rate)
        else:
            ranks[name] = np.full((L, K), check_rank(f"{name}_rank", rank, H))

    def groups(layer: int):
        def matrix(name):
            mean = calibration.get(f"{name}_mean")
            return Matrix(calibration[f"{name}_axes"][layer][None], None if mean is None else mean[layer])

        return by_rank(matrix("key"), matrix("value"), ranks["key"][layer], ranks["value"][layer])

    return from_first_chunk(project_by_head([groups(layer) for layer in range(L)]))


def _searched(calibration: Mapping[str, jax.Array], name: str, rate: float) -> np.ndarray:
    """i32[L, K]: the ranks of the greedy search at a rate."""
    if "rates" not in calibration:
        raise ValueError(
            f"{name}_rank must be given where the calibration has no search for ranks, got None; measure one with "
            "experiments.calibrate --method=matryoshka_pca."
        )
    rates = np.asarray(calibration["rates"]).round(4).tolist()
    if rate not in rates:
        raise ValueError(f"rate must be one that the calibration searched, {rates}, got {rate}.")
    return np.asarray(calibration[f"{name}_ranks"][rates.index(rate)], np.int32)
