"""MiniCache: pairs of deep layers share the directions of keys and values.

Liu, Liu, Pan, He, Haffari, Zhuang. "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models".
NeurIPS 2024. arXiv:2405.14366.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.transforms import CacheTransform, at_prefill_end, merge_layers


def minicache(
    start: int | float = 0.5, retain: Budget = 0.05, interpolation: float = 0.6
) -> CacheTransform:
    """Merges layers in pairs from the middle of the model on, but for the tokens that differ most.

    Bytes of a pair per KV head, with S tokens, m of them retained and numbers of e bytes:
    `(S - m) * (2 * H * e + 4 + 16) + 2 * m * (2 * H * e + 4)`.

    Deviations: the number of retained tokens is fixed, so that memory is; the paper retains those within a fraction
    0.05 of the largest distance, however many they are. The ranking is the paper's, keys or values, whichever
    differ more; a token is retained whole, in one row and head. Tokens that follow the prompt are not merged.

    It rests on neighbouring layers having similar directions. In SmolLM2-135M they have none: mean cosines of a pair
    are within 0.21 of zero for keys and 0.02 for values over 256 tokens of prose, and little survives the merge.

    Args:
      start: first layer that is merged: its index, or a fraction of the number of layers.
      retain: tokens per KV head that both layers keep exactly: a count, or a fraction of each row's prompt.
      interpolation: the paper's t: how far the shared direction is towards the deeper layer's.
    """
    return at_prefill_end(merge_layers(start, retain, interpolation=interpolation))
