"""ZipCache: tokens that receive most attention, per query that can see them, have more bits.

He, Zhang, Wu, Liu, Zhou, Zhuang. "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token
Identification". NeurIPS 2024. arXiv:2405.14256.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention
from kvjax.transforms import CacheTransform, at_prefill_end, chain, quantize, separate_values, split_slots


def zipcache(
    budget: Budget = 0.6, salient_bits: int = 4, bits: int = 2, group: int = 32, residual: int = 32
) -> CacheTransform:
    """Stores, per KV head, the most salient tokens with `salient_bits` and all others with `bits`.

    Saliency is the attention that a token received, divided by the queries that could see it. Keys have scales along
    channels; values are divided by `sqrt(max |v_c|)` and have one scale a token.

    Bytes per token and KV head: `2 * H * b / 8 + 4 * H / group + 4 + 4`, b the bits of its part, `4 * H` a row for the
    channels of values, and the exact tail.

    Deviations: all queries of the prompt are looked at, not the last and random 5 %; a value's scale is that of its
    head, a key channel's of `group` tokens. Tokens generated later are salient until the end: the paper scores them
    anew every 100 tokens.

    Args:
      budget: salient tokens per KV head, as a count or as a fraction of the prompt.
      salient_bits: 2, 3, 4 or 8.
      bits: of all other tokens.
      group: tokens of a key channel that share a scale.
      residual: tokens of a block of salient ones; the newest `number mod residual` stay exact.
    """
    packed = quantize(salient_bits, written_bits=bits, key_group=group, value_group=None, residual=residual)
    return at_prefill_end(chain(split_slots(accumulated_attention(normalise=True), budget), separate_values(), packed))
