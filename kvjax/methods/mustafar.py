"""Mustafar: keys and values without their smallest entries, token by token.

Joo, Hosseini, Hadidi, Asgari. "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference".
NeurIPS 2025. arXiv:2505.22913.
"""

from __future__ import annotations

from kvjax.codecs import Sparse
from kvjax.transforms import CacheTransform, at_prefill_end, store


def mustafar(
    key_sparsity: float = 0.5, value_sparsity: float | None = None, recent: int = 32, dtype: str | None = None
) -> CacheTransform:
    """Drops the `sparsity` smallest magnitudes of every key and value; the newest tokens stay whole.

    Bytes per token and KV head, with numbers of e bytes and n of H entries left: `2 * (H / 8 + e * n) + 4`, and the
    exact tail.

    Deviations: tokens leave the exact tail in blocks of `recent`, not one by one; a bitmap a token in place of the
    official tiles of 64 with an offset, whose numbers are padded to multiples of eight.

    Args:
      key_sparsity: fraction of a key's entries that are dropped, below 1.
      value_sparsity: of a value's; None: the same.
      recent: tokens of a block; the newest `length mod recent` stay whole.
      dtype: of the numbers that are left; None: the cache's.

    Raises:
      ValueError: a sparsity outside [0, 1), or recent below 1.
    """
    value_sparsity = key_sparsity if value_sparsity is None else value_sparsity
    for name, value in (("key_sparsity", key_sparsity), ("value_sparsity", value_sparsity)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}.")
    if recent < 1:
        raise ValueError(f"recent must be at least 1 token, got {recent}.")
    codecs = tuple(Sparse(None, None, sparsity, dtype=dtype) for sparsity in (key_sparsity, value_sparsity))
    return at_prefill_end(store("mustafar", codecs, recent, one_by_one=codecs))
