"""KVQuant: few levels that are not evenly spaced, keys from before RoPE by channel, outliers apart.

Hooper, Kim, Mohammadzadeh, Mahoney, Shao, Keutzer, Gholami. "KVQuant: Towards 10 Million Context Length LLM Inference
with KV Cache Quantization". NeurIPS 2024. arXiv:2401.18079.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kvjax.codecs import Corrected, Encoded, Levels, MidRange
from kvjax.segments.bases import Scales
from kvjax.transforms import CacheTransform, Scorer, at_prefill_end, chain, project, protect, store


def kvquant(
    calibration: Mapping[str, jax.Array],
    bits: int = 3,
    outliers: float = 0.01,
    sinks: int = 1,
    residual: int = 32,
    dtype: str = "bfloat16",
) -> CacheTransform:
    """Stores un-rotated keys in calibrated ranges of their channels, values in the range of their token.

    Levels between -1 and 1 are k-means of calibration numbers. The largest and the smallest numbers of a token are
    stored beside them, and a value's range leaves them out.

    Bytes per token and KV head, n outliers of a vector: `2 * H * bits / 8 + 2 * 3 * n + 4 + 4`, the exact tail, the
    sinks, and the constants of the model.

    Deviations: levels are shared by all layers, without weights of Fisher information; outliers are a fixed number of
    each token and head, at least two, where the paper's keys have those beyond their channel's range; new tokens wait
    in an exact tail until they fill words of codes; no Q-Norm.

    Args:
      calibration: of `experiments.calibrate --method=kvquant`: `key_low`, `key_high` f32[L, K, H], and for each number
        of bits `key_levels`, `value_levels` f32[2 ** bits].
      bits: 2, 3 or 4.
      outliers: fraction of the entries of a vector that are kept beside the codes; 0: none.
      sinks: first tokens that stay exact.
      residual: tokens of a block; the newest `length mod residual` stay exact.
      dtype: of outliers and of ranges of values.

    Raises:
      ValueError: bits are not 2, 3 or 4, outliers are outside [0, 1), or sinks or residual are impossible.
    """
    if bits not in (2, 3, 4):
        raise ValueError(f"bits must be 2, 3 or 4, got {bits}.")
    if not 0 <= outliers < 1:
        raise ValueError(f"outliers must be a fraction in [0, 1), got {outliers}.")
    low, high = calibration["key_low"], calibration["key_high"]
    half = jnp.maximum(high - low, 1e-6) / 2
    bases = [(Scales(1 / h[None], mean=m), None) for h, m in zip(half, (high + low) / 2)]

    def codec(inner: Encoded) -> Corrected:
        return Corrected(inner, None, None, "token", residual, 0, 0, outliers, dtype)

    keys, values = (Levels.of(calibration[f"{name}_levels{bits}"]) for name in ("key", "value"))
    if residual < 1 or residual % keys.block:
        raise ValueError(f"residual must be a positive multiple of {keys.block} for {bits} bits, got {residual}.")
    packed = store("kvquant", (codec(keys), codec(MidRange(values, None, None, dtype))), residual)
    compress = chain(project(bases, key_rope="at_attend"), packed)
    first = Scorer(lambda segment, seen: jnp.where(segment.pos < sinks, -1.0 * segment.pos, -jnp.inf), aligned=True)
    return at_prefill_end(protect(compress, first, sinks) if sinks else compress)
