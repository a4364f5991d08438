"""Video-XL-2: a prompt reads in groups of tokens, each with a few groups before it and the first tokens.

Qin, Liu, Liang, Shu, Yuan, Zhou, Xiao, Zhao, Liu. "Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware
KV Sparsification". 2025. arXiv:2506.19225.
"""

from __future__ import annotations

from kvjax.block_choices import Nearby
from kvjax.transforms import CacheTransform, attend_prompt


def videoxl2(group: int = 1024, previous: int = 1, first: int = 128, block: int = 128) -> CacheTransform:
    """Lets every group of tokens read itself, `previous` groups before it and the `first` tokens; the last reads all.

    The cache keeps everything: chain it with a method that compresses.

    Deviations: groups are tokens of text, not frames; no timestamps that all groups see; the second level, a pooled
    copy of the cache of which parts are loaded, is not here. The group of a row's last token is what the paper calls
    the question. Which groups are loaded later is left to what is chained.
    Of a prompt in chunks, a chunk reads everything before it.

    Args:
      group: tokens of a group, whole blocks.
      previous: groups before it that a group reads.
      first: tokens that everything reads, whole blocks.
      block: tokens of a block.

    Raises:
      ValueError: group or first are no whole blocks, or previous is below 0.
    """
    if block < 1 or group < block or group % block:
        raise ValueError(f"group must be a positive multiple of the block of {block} tokens, got {group}.")
    if first < 0 or first % block:
        raise ValueError(f"first must be a multiple of the block of {block} tokens, got {first}.")
    if previous < 0:
        raise ValueError(f"previous must be at least 0 groups, got {previous}.")
    return attend_prompt(Nearby(group // block, previous, first // block), block=block)
