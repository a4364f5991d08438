"""xKV: one low-rank factorisation of the keys, and of the values, of several layers.

Chang, Lin, Lin, Chiang, Akhauri, Abdelfattah, Wu, Ceze, Wu, Abdelfattah. "xKV: Cross-Layer SVD for KV-Cache
Compression". 2025. arXiv:2503.18893.
"""

from __future__ import annotations

from kvjax.transforms import CacheTransform, at_prefill_end, share_basis


def xkv(layers: int = 4, key_rank: int | float = 0.125, value_rank: int | float = 0.1875) -> CacheTransform:
    """Stores a vector of coordinates a token for each group of layers, un-rotated keys and values apart.

    The defaults are the paper's for Llama-3.1-8B: ranks 512 and 768 of the 4 * 8 * 128 channels of a group. Bytes of
    a group, with numbers of e bytes: `e * (R_k + R_v) * (S + layers * K * H) + 4 * S` a row: bases belong to the
    prompt, so it must be long to save much. Tokens that follow the prompt are exact, as in the paper.

    Deviations: the factorisation is six rounds of subspace iteration from a fixed start instead of an exact SVD, and
    coordinates are scaled to unit variance, the bases inversely.

    Args:
      layers: of a group.
      key_rank: coordinates of a token's keys, as a count or as a fraction of the channels of all heads of a group.
      value_rank: the same for values.
    """
    return at_prefill_end(share_basis(layers, key_rank, value_rank))
