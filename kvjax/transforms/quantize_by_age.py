"""Stores blocks of tokens with ever fewer bits as they age."""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.codecs import Affine
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.quantize import Band, check_block, store
from pallas_kernels.quantize_pack import Axis


def quantize_by_age(
    bits: Sequence[int] = (8, 4, 2),
    blocks: Sequence[int] = (2, 4),
    *,
    group: int = 32,
    residual: int = 32,
    scale_dtype: str = "bfloat16",
    key_axis: Axis = "channel",
) -> CacheTransform:
    """Stores keys and values as affine codes whose bits fall with age: a staircase that tokens descend block by block.

    The newest `length mod residual` tokens are exact. Then come `blocks[0]` blocks of `residual` tokens with `bits[0]`,
    `blocks[1]` with `bits[1]`, and so on; all older ones have the last bits. A block that leaves a band is decoded and
    encoded again a step down, so its error is that of both codes. Groups lie within blocks, and so never change.

    Args:
      bits: 2, 3, 4 or 8 per stored number, of each band from the newest on, falling.
      blocks: of every band but the last, which takes all that come.
      group: tokens of a channel, and channels of a value, that share a scale.
      residual: tokens of a block, and the most that are kept exact.
      scale_dtype: dtype of scales and zeros.
      key_axis: see `quantize`.

    Raises:
      ValueError: bits do not fall or are impossible, or blocks are not one fewer or below one.
    """
    if any(b not in (2, 3, 4, 8) for b in bits) or list(bits) != sorted(set(bits), reverse=True) or not bits:
        raise ValueError(f"bits must be falling numbers out of 8, 4, 3 and 2, got {tuple(bits)}.")
    if len(blocks) != len(bits) - 1 or any(count < 1 for count in blocks):
        want = f"{len(bits) - 1} counts of at least 1 for {len(bits)} bands"
        raise ValueError(f"blocks must be {want}, got {tuple(blocks)}.")
    for b in bits:
        check_block(b, residual, group, group_name="group")

    def codecs(b: int) -> tuple[Affine, Affine]:
        how = dict(block=residual, scale_dtype=scale_dtype)
        return Affine.of_blocks(b, group, key_axis, **how), Affine.of_blocks(b, group, "token", **how)

    bands = tuple(Band(codecs(b), count) for b, count in zip(bits, blocks))
    slots = tuple(Affine.of_slots(bits[0], group, scale_dtype=scale_dtype) for _ in range(2))
    return store("quantize_by_age", codecs(bits[-1]), residual, bands=bands, one_by_one=slots)
