"""SAQ, staircase adaptive quantization: KIVI whose bits fall step by step as tokens age.

Known to us from its abstract alone, which names KIVI as its base, a staircase of gradual degradation, and models with
few KV heads as its use; no code is known, and this is our reading of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.transforms import CacheTransform, at_prefill_end, quantize_by_age


def saq(
    bits: Sequence[int] = (8, 4, 2), blocks: Sequence[int] = (4, 8), group: int = 32, residual: int = 32
) -> CacheTransform:
    """Stores the newest blocks of tokens with the most bits; a block goes a step down as others come.

    Bytes per token and KV head in a band of b bits: `2 * H * (b / 8 + 4 / group) + 4`; and the exact tail.

    Deviations: lengths and bits of the steps are ours. A block that descends is decoded and encoded again, so it has
    the errors of both codes.

    Args:
      bits: of every step, falling; 8, 4, 3 or 2.
      blocks: of `residual` tokens, in every step but the last.
      group: tokens of a key channel, and channels of a value, that share a scale.
      residual: tokens of a block; the newest `length mod residual` stay exact.
    """
    return at_prefill_end(quantize_by_age(bits, blocks, group=group, residual=residual))
