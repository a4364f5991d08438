"""TurboQuant: random rotation, then the best scalar quantizer for normal numbers; norms apart.

Zandieh, Daliri, Hadian, Mirrokni. "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate". 2025.
arXiv:2504.19874.
"""

from __future__ import annotations

from kvjax.transforms import CacheTransform, at_prefill_end, center_keys, chain, quantize_levels, rotate_channels


def turboquant(bits: int = 4, value_bits: int | None = None, seed: int = 0) -> CacheTransform:
    """Stores every key and value, as it comes, as its norm and `bits` per rotated channel; without calibration.

    The relative squared error of random vectors is that of Lloyd-Max codes of a normal distribution: 0.1175, 0.0345
    and 0.0095 at 2, 3 and 4 bits.

    Bytes per token and KV head: `H * (bits + value_bits) / 8 + 8 + 4`, and `4 * H` a row for the mean key.

    Outlier channels: an offset that all keys share is read apart as their mean, in channels that RoPE turns slowly; in
    others rotation shares it out over all channels, and it costs the precision of the rest.

    Deviations: keys are centred; the variant that minimises squared error (the paper's Q_mse; its Q_prod spends one bit
    on an unbiased inner product); a Hadamard matrix with random signs in place of a dense random rotation, so H is a
    power of two; levels are those of a normal distribution, which coordinates of H >= 64 channels nearly have; norms
    are float32. At 2 bits one in a few hundred queries finds another key than its own where keys have outlier channels.

    Args:
      bits: 2, 3 or 4 per number of a key.
      value_bits: of a value; None: `bits`.
      seed: of the signs.
    """
    return at_prefill_end(chain(center_keys(), rotate_channels(seed), quantize_levels(bits, value_bits)))
