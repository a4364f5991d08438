"""QJL: keys as signs of a random projection and their norms, values in 2 bits.

Zandieh, Daliri, Han. "QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead". AAAI 2025.
arXiv:2406.03482.
"""

from __future__ import annotations

from kvjax.codecs import Affine, SignSketch
from kvjax.transforms import CacheTransform, at_prefill_end, store
from kvjax.transforms.quantize import check_block


def qjl(
    width: float = 2.0, outliers: int = 8, value_bits: int = 2, group: int = 32, residual: int = 128, seed: int = 0
) -> CacheTransform:
    """Stores keys as `width * H` signs and a norm; of every `group` tokens the largest channels are sketched apart.

    Logits have no bias over the random projection; their error falls with the square root of `width * H`.

    Bytes per token and KV head: `(width + 1) * H / 8 + 4 + outliers / group` for the key, `H * (value_bits / 8 + 4 /
    group)` for the value, 4, and the exact tail.

    Deviations: the same number of signs in every layer, where the official code has 512 of 128 channels in the first
    15; outlier channels have H signs; norms are bfloat16 and both are stored, where it stores that of all channels;
    values leave the exact tail in blocks.

    Args:
      width: signs of a key, as a multiple of H.
      outliers: channels of a group of tokens that are sketched apart; 0: none.
      value_bits: 2, 3, 4 or 8.
      group: tokens that share outlier channels, and channels of a value that share a scale.
      residual: tokens of a block; the newest `length mod residual` stay exact.
      seed: of the projection.

    Raises:
      ValueError: width is not positive, outliers are negative, or a block holds no whole groups and words.
    """
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}.")
    if outliers < 0 or group < 1:
        raise ValueError(f"outliers must be at least 0 and group at least 1, got {outliers} and {group}.")
    check_block(1, residual, group, group_name="group")
    keys = SignSketch(None, None, None, width, outliers, group, seed)
    values = Affine.of_blocks(value_bits, group, "token", block=residual)
    return at_prefill_end(store("qjl", (keys, values), residual))
