"""FP8 cache: 8-bit floats with a scale of one.

Micikevicius et al. "FP8 Formats for Deep Learning". 2022. arXiv:2209.05433. The uncalibrated default of serving
engines (vLLM's `kv_cache_dtype=fp8`).
"""

from __future__ import annotations

from kvjax.transforms import CacheTransform, cast


def fp8(dtype: str = "float8_e4m3fn") -> CacheTransform:
    """Stores keys and values as 8-bit floats.

    Args:
      dtype: "float8_e4m3fn" (3 bits of mantissa, up to 448) or "float8_e5m2" (2 bits, up to 57344).
    """
    return cast(dtype)
