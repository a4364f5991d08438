"""XAttention: a prompt reads the blocks of keys to which antidiagonals of its logits point.

Xu, Xiao, Huang, Guo, Han. "XAttention: Block Sparse Attention with Antidiagonal Scoring". ICML 2025. arXiv:2503.16428.
"""

from __future__ import annotations

from kvjax.block_choices import Antidiagonals
from kvjax.transforms import CacheTransform, attend_prompt


def xattention(tau: float = 0.9, stride: int = 8, block: int = 128, most: float = 1.0) -> CacheTransform:
    """Reads for each block of queries and head the fewest blocks of keys that promise `tau` of the attention.

    The cache keeps everything: chain it with a method that compresses. Scores cost `1 / stride` of the logits' FLOPs.

    Deviations: one tau for all layers and heads, not a table of measured ones. The last tokens of the prompt read
    everything in the last layer. Of a prompt in chunks, a chunk reads everything before it.

    Args:
      tau: share of the attention, in (0, 1]; 1.0: every block.
      stride: tokens of an antidiagonal, which divide `block`.
      block: tokens of a block.
      most: fraction of the blocks that may be read, see `kvjax.PromptAttention`.

    Raises:
      ValueError: tau, stride, block or most make no sense.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau must be in (0, 1], got {tau}.")
    if stride < 1 or block % stride:
        raise ValueError(f"stride must be at least 1 and divide the block of {block} tokens, got {stride}.")
    return attend_prompt(Antidiagonals(stride, tau), block=block, most=most)
