"""MatryoshkaKV: keys and values in orthogonal bases of each head, cut to the axes that matter.

Lin, Zeng, Xiao, Kou, Hou, Gao, Zhang, Deng. "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal
Projection". ICLR 2025. arXiv:2410.14731.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.segments.latent import Matrix
from kvjax.transforms import CacheTransform, at_prefill_end, project


def matryoshka_pca(
    calibration: Mapping[str, jax.Array], key_rank: int | float = 0.5, value_rank: int | float = 0.5
) -> CacheTransform:
    """Projects each head's rotated keys, and values, on their first principal components, new tokens included.

    Attention runs in the reduced space. The untrained starting point of the paper; one rank for all heads.

    Args:
      calibration: of `experiments.calibrate --method=matryoshka_pca`: `key_mean`, `value_mean` f32[L, K, H] and
        `key_axes`, `value_axes` f32[L, K, H, H], columns by falling variance.
      key_rank: columns kept, as a count or as a fraction of H.
      value_rank: the same for values.

    Raises:
      ValueError: a rank above H, or below one.
    """
    H = calibration["key_axes"].shape[-1]
    ranks = {}
    for name, rank in (("key_rank", key_rank), ("value_rank", value_rank)):
        ranks[name] = int(rank * H) if isinstance(rank, float) else rank
        if not 1 <= ranks[name] <= H:
            raise ValueError(f"{name} must be from 1 to the {H} channels of a head, got {rank}.")

    def basis(layer: int, name: str) -> Matrix:
        axes = calibration[f"{name}_axes"][layer][None, :, :, : ranks[f"{name}_rank"]]
        return Matrix(axes, calibration[f"{name}_mean"][layer])

    layers = range(calibration["key_axes"].shape[0])
    return at_prefill_end(project([(basis(layer, "key"), basis(layer, "value")) for layer in layers]))
