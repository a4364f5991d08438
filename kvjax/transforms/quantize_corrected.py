"""Quantizes dense slots and keeps, beside the codes, outliers and a low-rank part of the error."""

from __future__ import annotations

from kvjax.codecs import Affine, Corrected
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.quantize import check_block, store


def quantize_corrected(
    bits: int,
    *,
    rank: int,
    outliers: float,
    key_group: int = 64,
    value_group: int = 64,
    block: int = 64,
    loops: int = 3,
    scale_dtype: str = "bfloat16",
) -> CacheTransform:
    """`quantize`, with `x ~ codes + outliers + low rank` for every block of tokens of every KV head.

    Args:
      bits: 2, 4 or 8 per stored number.
      rank: of the factors of a block; 0: none. At most `block` and the head dimension.
      outliers: fraction of the entries of a key channel in a block, and of a token's value, that are stored beside
        the codes: half of them the largest, half the smallest, at least one of each. 0: none.
      key_group: tokens of a channel that share a key scale; divides `block`.
      value_group: channels of a token that share a value scale; divides the head dimension.
      block: tokens that are encoded together, and the most that are kept exact.
      loops: power iterations that find the factors.
      scale_dtype: dtype of scales, zeros, factors and outliers.

    Raises:
      ValueError: bits, groups, rank or outliers are impossible.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}.")
    for name, value in (("key_group", key_group), ("value_group", value_group)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    check_block(bits, block, key_group, "block")
    if not 0 <= rank <= block:
        raise ValueError(f"rank must be from 0 to the {block} tokens of a block, got {rank}.")
    if not 0 <= outliers < 1:
        raise ValueError(f"outliers must be a fraction in [0, 1), got {outliers}.")
    if loops < 1:
        raise ValueError(f"loops must be at least 1, got {loops}.")

    def corrected(group: int, axis: str) -> Corrected:
        codes = Affine.of_blocks(bits, group, axis, block=block, scale_dtype=scale_dtype)
        return Corrected(codes, None, None, axis, block, rank, loops, outliers, scale_dtype)

    return store("quantize_corrected", (corrected(key_group, "channel"), corrected(value_group, "token")), block)
