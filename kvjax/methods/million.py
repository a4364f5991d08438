"""MILLION: product quantization of keys and values, the newest tokens exact.

Wang, Xu, Liu, Hu, Sun, Li, Li, Wang, Jiang, Guan. "MILLION: MasterIng Long-Context LLM Inference Via
Outlier-Immunized KV Product QuaNtization". DAC 2025. arXiv:2504.03661.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.transforms import CacheTransform, from_first_chunk, product_quantize


def million(
    calibration: Mapping[str, jax.Array], residual: int = 128, codebook_dtype: str = "bfloat16"
) -> CacheTransform:
    """Stores each pair of channels of rotated keys, and of values, as the 8-bit index of its nearest centroid.

    Bytes per token and KV head: `2 * M * bits / 8 + 4`, plus the residual and `2 * C * H * itemsize` of codebooks a
    layer: M = H / 2 sub-vectors of 8 bits are 4 bits a number.

    Deviations: every layer has codebooks of its own instead of one for all, as each layer holds its copy; the rest of
    the prompt that fills no block stays exact.

    Args:
      calibration: of `experiments.calibrate --method=million`: `key_codebook`, `value_codebook` f32[L, M, C, H / M].
      residual: tokens of a block; the newest `length mod residual` stay exact.
      codebook_dtype: floating dtype that centroids are stored in.
    """
    names = "key_codebook", "value_codebook"
    stored = (calibration[name].astype(codebook_dtype) for name in names)
    return from_first_chunk(product_quantize(list(zip(*stored, strict=True)), residual=residual))
