"""GEAR: quantization whose error is repaired by a low-rank part and a few outliers.

Kang, Zhang, Kundu, Jeong, Liu, Krishna, Zhao. "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless
Generative Inference of LLM". 2024. arXiv:2403.05527.
"""

from __future__ import annotations

from kvjax.transforms import CacheTransform, from_first_chunk, quantize_corrected


def gear(
    bits: int = 2, group: int = 64, block: int = 64, rank: int = 2, outliers: float = 0.02, loops: int = 3
) -> CacheTransform:
    """Quantizes blocks of `block` tokens as KIVI does; each head's block has rank-`rank` factors and outliers.

    With head dimension H, n and m outliers of a key channel in a block and of a token's value, bytes per token
    and KV head are `2 * H * (bits / 8 + 4 / group) + 4 + 4 * rank * (1 + H / block) + 3 * (n * H / block + m)`, plus
    the exact tail.

    Deviations: the prompt is stored in the same blocks as what follows (the official code gives it one pair of
    factors of rank 4); outliers of a value are sought in each head, not over all heads of a token, and there are
    at least two of a vector, which is 3 percent of 64; outliers and factors are bfloat16.

    Args:
      bits: 2, 4 or 8.
      group: tokens of a key channel, and channels of a value, that share a scale.
      block: tokens that are encoded together.
      rank: of the low-rank part; 0 leaves it out.
      outliers: fraction of the entries kept beside the codes; 0 is the paper's GEAR-L.
      loops: power iterations.
    """
    return from_first_chunk(
        quantize_corrected(
            bits, rank=rank, outliers=outliers, key_group=group, value_group=group, block=block, loops=loops
        )
    )
