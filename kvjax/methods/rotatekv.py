"""RotateKV: 2 bits for rotated keys and values, attention sinks exact.

Su, Chen, Shen, Wei, Li, Yu, Yuan. "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via
Outlier-Aware Adaptive Rotations". IJCAI 2025. arXiv:2501.16383.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from kvjax.scores import massive_activations
from kvjax.segments.hadamard import Hadamard
from kvjax.transforms import CacheTransform, at_prefill_end, chain, project, protect, quantize


def rotatekv(
    calibration: Mapping[str, jax.Array],
    bits: int = 2,
    clip: float | None = None,
    group: int | None = None,
    heads: int | None = None,
    sinks: int = 20,
    residual: int = 16,
    scale_dtype: str = "bfloat16",
) -> CacheTransform:
    """Quantizes, per token, keys from before RoPE and values in Hadamard coordinates; protects attention sinks.

    Keys of `heads` KV heads are rotated together, their coordinates ordered by mean, so that those of a group are
    alike; values are rotated head by head. Sinks are the tokens that own the `sinks` largest entries of a layer's
    input.

    Bytes per token and KV head: `2 * H * (bits / 8 + 4 / group) + 4`, plus `sinks` exact slots and the residual.

    Deviations: new tokens wait in an exact tail until they fill words of codes, instead of being quantized one by
    one; groups are at most a head; zeros are not rounded to multiples of the scale, and a range is clipped around its
    middle, not around 0 (the same where it is symmetric).

    Args:
      calibration: of `experiments.calibrate --method=rotatekv`: `key_mean` f32[L, K, H], of un-rotated keys.
      bits: 2, 3, 4 or 8.
      clip: fraction of a group's range that codes span; None: 0.8 for 2 bits, else 1.
      group: channels that share a scale; None: the H of a head (the paper's 128).
      heads: KV heads that are rotated together; None: 4, or 2 or 1 where 4 does not divide K.
      sinks: largest entries whose tokens are exact, and slots for them.
      residual: tokens of a block; the newest `length mod residual` stay exact.
      scale_dtype: dtype of scales and zeros.

    Raises:
      ValueError: heads does not divide K, group does not divide H, or H or heads is not a power of two.
    """
    mean = calibration["key_mean"]
    _, K, H = mean.shape
    group = H if group is None else group
    heads = math.gcd(4, K) if heads is None else heads
    if group < 1 or H % group:
        raise ValueError(f"group must divide the {H} channels of a head, got {group}.")
    clip = (0.8 if bits == 2 else 1.0) if clip is None else clip
    bases = [(Hadamard.sorted_by(layer, heads), Hadamard()) for layer in mean]
    rotate = project(bases, key_rope="at_attend")
    pack = quantize(
        bits,
        key_group=group,
        value_group=group,
        residual=residual,
        scale_dtype=scale_dtype,
        key_axis="token",
        clip=clip,
    )
    compress = chain(rotate, pack)
    return at_prefill_end(protect(compress, massive_activations(sinks), sinks) if sinks else compress)
