"""FP8 cache: 8-bit floats with a scale of one, or one for each token.

Micikevicius et al. "FP8 Formats for Deep Learning". 2022. arXiv:2209.05433. The uncalibrated default of serving
engines (vLLM's `kv_cache_dtype=fp8`).
"""

from __future__ import annotations

from typing import Literal

from kvjax.transforms import CacheTransform, cast


def fp8(dtype: str = "float8_e4m3fn", scale: Literal["one", "token"] = "one") -> CacheTransform:
    """Stores keys and values as 8-bit floats.

    Args:
      dtype: "float8_e4m3fn" (3 bits of mantissa, up to 448) or "float8_e5m2" (2 bits, up to 57344).
      scale: "one", as uncalibrated engines do; "token" divides each key and value by its own size.
    """
    return cast(dtype, scale=scale)
