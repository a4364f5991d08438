"""MiKV: no token left behind; those that would be evicted are kept with fewer bits.

Yang, Kim, Lee, Kwon, Lee. "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision
Quantization". 2024. arXiv:2402.18096.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention
from kvjax.transforms import CacheTransform, at_prefill_end, balance_channels, chain, quantize, split_slots


def mikv(
    budget: Budget = 0.25,
    recent: Budget = 0.5,
    important_bits: int = 8,
    bits: int = 2,
    group: int = 32,
    residual: int = 32,
    balance: bool = True,
) -> CacheTransform:
    """Stores, per KV head, the tokens that H2O would keep with `important_bits` and all others with `bits`.

    Keys and values are quantized per token, `group` channels to a scale; the keys with `bits` after a balancer has
    scaled their channels by `sqrt(max |q| / max |k|)`.

    Bytes per token and KV head: `2 * H * (b / 8 + 4 / group) + 4`, b the bits of its part; and the exact tail.

    Deviations: no official code is known; the groups and the share of important tokens are ours. The split is that
    of the prompt: tokens generated later are important, and none is demoted while decoding. Scores are averaged over
    a query group, and the balancer takes the largest query of the group.

    Args:
      budget: important tokens per KV head, as a count or as a fraction of the prompt.
      recent: share of the budget (float) or tokens (int) given to the newest.
      important_bits: 2, 3, 4 or 8.
      bits: of all other tokens.
      group: channels of a token that share a scale.
      residual: tokens of a block of important ones; the newest `number mod residual` stay exact.
      balance: with the channel balancer.
    """
    packed = quantize(
        important_bits, written_bits=bits, key_group=group, value_group=group, residual=residual, key_axis="token"
    )
    parts = [split_slots(accumulated_attention(), budget, recent=recent), packed]
    if balance:
        parts.insert(1, balance_channels(where="written"))
    return at_prefill_end(chain(*parts))
