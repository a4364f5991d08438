"""VidKV: keys with one or two bits by channel, values with three states.

Tao, You, Sui, Qin, Wang. "Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models". 2025.
arXiv:2503.16257.
"""

from __future__ import annotations

from kvjax.codecs import Affine, Fourier, Halves, MeanLevels
from kvjax.transforms import CacheTransform, at_prefill_end, chain, order_channels, store
from kvjax.transforms.quantize import check_block


def vidkv(fraction: float = 0.5, group: int = 32, residual: int = 128) -> CacheTransform:
    """Stores the key channels of widest range with 2 bits, the others with 1 bit in the Fourier domain of channels.

    A value channel has codes -1, 0 and 1 times its mean magnitude over `group` tokens, 0 within half of that.

    Bytes per token and KV head, n of H key channels with 2 bits: `n * (1 / 4 + 4 / group) + (H - n) * (1 / 8 + 2 /
    group)` for the key, `ceil(H / 5) + 2 * H / group` for the value, 4, and the exact tail; `4 * H` a row for their
    order.

    Deviations: channels are chosen in each row and KV head by its prompt, not alike in all; a real Fourier transform,
    with one bit a channel where the official code stores two; three states in bytes of five; no exception for values
    of selected visual tokens; what leaves the exact tail is not quantized again.

    Args:
      fraction: of the key channels that have 2 bits: 0.5 makes 1.5 bits.
      group: tokens of a channel that share a scale.
      residual: tokens of a block; the newest `length mod residual` stay exact.

    Raises:
      ValueError: fraction is outside (0, 1), or a block holds no whole groups and words.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}.")
    check_block(1, residual, group, group_name="group")
    wide = Affine.of_blocks(2, group, "channel", block=residual)
    keys = Halves(wide, Fourier(MeanLevels(None, None, 2, group)), fraction)
    return at_prefill_end(chain(order_channels(), store("vidkv", (keys, MeanLevels(None, None, 3, group)), residual)))
