"""OliVe: 4 bits a number, outliers at the cost of their neighbours.

Guo, Tang, Hu, Leng, Zhang, Yang, Liu, Guo, Zhu. "OliVe: Accelerating Large Language Models via Hardware-friendly
Outlier-Victim Pair Quantization". ISCA 2023. arXiv:2304.07493.
"""

from __future__ import annotations

from kvjax.codecs import Pairs
from kvjax.transforms import CacheTransform, at_prefill_end, store


def olive() -> CacheTransform:
    """Stores every key and value, as it comes, as pairs of 4-bit codes of which an outlier takes both ranges.

    Bytes per token and KV head: `2 * (H / 2 + 2) + 4`.

    Deviations: the paper quantizes weights and activations with a scale a tensor; here each key and value has a
    scale, and neighbours are channels of its head. Only int4 normals with E2M1 outliers, not the flint type.
    """
    codecs = 2 * (Pairs(None, None),)
    return at_prefill_end(store("olive", None, 0, written=codecs, one_by_one=codecs))
