"""FP8 cache with calibrated scales: 8-bit floats, a scale for the keys and one for the values of every head.

Micikevicius et al. "FP8 Formats for Deep Learning". 2022. arXiv:2209.05433. What serving engines do with a calibrated
checkpoint (vLLM's `k_scale` and `v_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kvjax.segments.bases import Scales
from kvjax.transforms import CacheTransform, at_prefill_end, cast, chain, project


def fp8_scaled(
    calibration: Mapping[str, jax.Array], dtype: str = "float8_e4m3fn", headroom: float = 1.0
) -> CacheTransform:
    """Stores keys and values as 8-bit floats of `x / s`; what lies beyond the calibrated range is clipped.

    `s = headroom * largest / max(dtype)`, of every layer and KV head.

    Bytes per token and KV head: `2 * H + 4`; scales are constants of the model, stored for every channel.

    Args:
      calibration: of `experiments.calibrate --method=fp8_scaled`: `key_peak`, `value_peak` f32[L, K, H], the
        largest magnitudes of the channels of rotated keys and of values.
      dtype: "float8_e4m3fn" or "float8_e5m2".
      headroom: how far beyond the calibrated range numbers may go.

    Raises:
      ValueError: another dtype, or headroom is not above 0.
    """
    if dtype not in ("float8_e4m3fn", "float8_e5m2"):
        raise ValueError(f"dtype must be 'float8_e4m3fn' or 'float8_e5m2', got {dtype!r}.")
    if not headroom > 0:
        raise ValueError(f"headroom must be above 0, got {headroom}.")
    most = float(jnp.finfo(dtype).max)

    def scales(name: str) -> list[Scales]:
        peak = jnp.max(calibration[name], axis=2, keepdims=True)
        factor = most / (headroom * jnp.where(peak > 0, peak, 1.0))
        return [Scales(of_layer[None]) for of_layer in jnp.broadcast_to(factor, calibration[name].shape)]

    bases = list(zip(scales("key_peak"), scales("value_peak")))
    return at_prefill_end(chain(project(bases), cast(dtype)))
