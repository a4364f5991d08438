"""Palu: a low-rank cache of groups of KV heads, keys from before RoPE.

Chang, Lin, Lin, Chen, Hu, Wang, Huang, Ceze, Abdelfattah, Wu. "Palu: Compressing KV-Cache with Low-Rank Projection".
ICLR 2025. arXiv:2407.21118.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.segments.bases import Matrix
from kvjax.transforms import CacheTransform, at_prefill_end, project_by_group
from kvjax.transforms.project import check_rank


def palu(
    calibration: Mapping[str, jax.Array], key_rank: int | float = 0.5, value_rank: int | float = 0.5
) -> CacheTransform:
    """Stores un-rotated keys, and values, of every group of heads as one vector of coordinates a token, as they come.

    The coordinates are those of the largest singular values of a group's projection whitened by its inputs: with
    `C C^T = sum x x^T`, an SVD of `W C` leaves the least error of `W x` over calibration text, as the principal
    components of `W x` do.

    Bytes per token and group of g heads, with numbers of e bytes: `e * (key_rank + value_rank) + 4`; and the bases.

    Deviations: one rank for all groups of all layers, where the paper shares ranks out by Fisher information; bases
    are applied to keys and values, not fused into the projections, and the way back of values is not fused into the
    output's. Quantized coordinates are a composition: `quantize` after it.

    Args:
      calibration: of `experiments.calibrate --method=palu`: `key_axes`, `value_axes` f32[L, K, H, g * H], columns by
        falling power; g consecutive heads share coordinates.
      key_rank: coordinates of a group's key, as a count or as a fraction of g * H.
      value_rank: the same for values.

    Raises:
      ValueError: a rank above g * H, or below one.
    """
    L, K, H, width = calibration["key_axes"].shape
    ranks = {"key": check_rank("key_rank", key_rank, width), "value": check_rank("value_rank", value_rank, width)}

    def basis(name: str, layer: int, heads: tuple[int, ...]) -> Matrix:
        return Matrix(calibration[f"{name}_axes"][layer][None]).cut(heads, ranks[name])

    groups = [tuple(range(first, first + width // H)) for first in range(0, K, width // H)]
    bases = [[(basis("key", layer, of), basis("value", layer, of)) for of in groups] for layer in range(L)]
    return at_prefill_end(project_by_group(bases, groups))
