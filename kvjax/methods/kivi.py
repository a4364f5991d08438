"""KIVI: keys quantized per channel, values per token, the newest tokens exact.

Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu. "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV
Cache". ICML 2024. arXiv:2402.02750.
"""

from __future__ import annotations

from kvjax.transforms import CacheTransform, at_prefill_end, center_keys, chain, from_first_chunk, quantize


def kivi(
    bits: int = 2,
    group: int = 32,
    residual: int = 128,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    center: bool = False,
) -> CacheTransform:
    """Quantizes the cache to `bits` per number, `group` numbers to a scale.

    Bytes per token and KV head: `H * ((key_bits + value_bits) / 8 + 8 / group) + 4`, plus the residual.

    Deviations: a prompt that comes in chunks is stored so from the first of them on, and each reads those before it as
    codes, where the paper reads a prompt exactly; `at_prefill_end(kivi(...))` does, and holds all of it until then.
    Values leave the exact tail in the same blocks as keys, not one by one; scales are bfloat16 rounded outwards instead
    of float16.

    Args:
      bits: 2, 3, 4 or 8.
      group: tokens of a key channel, and channels of a value, that share a scale.
      residual: tokens of a block; the newest `length mod residual` stay exact.
      key_bits: of the keys; None: `bits`.
      value_bits: of the values; None: `bits`.
      center: keys are stored less their mean (`center_keys`): for models whose keys have large offsets.
    """
    key_bits, value_bits = (bits if b is None else b for b in (key_bits, value_bits))
    how = dict(key_group=group, value_group=group, residual=residual)
    packed = quantize(key_bits, value_bits=value_bits, **how)
    return at_prefill_end(chain(center_keys(), packed)) if center else from_first_chunk(packed)
