"""KQ-SVD: keys in the directions that their queries read, values in those that the output projection reads.

Lesens, Rakhshan, Rabusseau. "KQ-SVD: Compressing the KV Cache with Provable Guarantees on Attention Fidelity".
AISTATS 2026. arXiv:2512.05916.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.segments.bases import Matrix
from kvjax.transforms import CacheTransform, from_first_chunk, project
from kvjax.transforms.project import check_rank


def kqsvd(
    calibration: Mapping[str, jax.Array], key_rank: int | float = 0.5, value_rank: int | float = 0.5
) -> CacheTransform:
    """Projects each head's rotated keys, and values, so that logits and attention outputs change least.

    The best rank-R approximation of `Q K^T` over calibration text, all queries of a group together, instead of that
    of K alone; and of what attention makes of values, `softmax(Q K^T) V W_o`. Attention runs in the reduced space; new
    tokens are projected at once.

    Deviations: one rank for all heads of all layers; values count as attention weighs them (the paper takes `V W_o`),
    and W_o as the sum over a query group.

    Args:
      calibration: of `experiments.calibrate --method=kqsvd`: `key_axes`, `key_inverse`, `value_axes`,
        `value_inverse` f32[L, K, H, H], columns by falling weight.
      key_rank: columns kept, as a count or as a fraction of H.
      value_rank: the same for values.

    Raises:
      ValueError: a rank above H, or below one.
    """
    L, K, H, _ = calibration["key_axes"].shape
    ranks = {"key": check_rank("key_rank", key_rank, H), "value": check_rank("value_rank", value_rank, H)}

    def basis(layer: int, name: str) -> Matrix:
        axes, inverse = (calibration[f"{name}_{part}"][layer][None] for part in ("axes", "inverse"))
        return Matrix(axes, inverse=inverse).cut(range(K), ranks[name])

    return from_first_chunk(project([(basis(layer, "key"), basis(layer, "value")) for layer in range(L)]))
