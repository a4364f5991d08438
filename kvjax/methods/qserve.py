"""QServe's KV4, which is FireQ's cache too: 4 bits for every token as it comes, key channels smoothed in pairs.

Lin, Tang, Yang, Zhang, Xiao, Gan, Han. "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving".
MLSys 2025. arXiv:2405.04532. Ji et al. "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference
Acceleration". 2025. arXiv:2505.20839.
"""

from __future__ import annotations

from kvjax.transforms import CacheTransform, at_prefill_end, chain, quantize, smooth_channels


def qserve(bits: int = 4, power: float = 0.5, scale_dtype: str = "bfloat16") -> CacheTransform:
    """Quantizes every key and value by itself, all channels of a head to a scale and a zero, none kept exact.

    SmoothAttention divides rotated keys by `lambda = max |k| ** power`, the same for both channels of a RoPE pair, and
    multiplies queries by it.

    Bytes per token and KV head: `2 * (H * bits / 8 + 4) + 4`, and `4 * H` a row for lambda.

    Deviations: lambda is that of the row's prompt, not of calibration texts, and is not folded into the projections;
    scales are bfloat16 rounded outwards instead of float16. Of FireQ the cache alone: its codes are symmetric and its
    second smoothing, of single channels after RoPE, is left out.

    Args:
      bits: 2, 3, 4 or 8.
      power: of the largest magnitudes; 0 leaves smoothing out.
      scale_dtype: dtype of scales and zeros.
    """
    how = dict(key_group=None, value_group=None, key_axis="token", residual=0, scale_dtype=scale_dtype)
    packed = quantize(bits, **how)
    return at_prefill_end(chain(smooth_channels(power), packed) if power else packed)
