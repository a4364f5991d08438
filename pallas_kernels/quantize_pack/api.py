"""Chooses an implementation of `quantize_pack`."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.quantize_pack import mosaic_tpu, reference
from pallas_kernels.quantize_pack.reference import Axis, Packed
from pallas_kernels.words import WORD_BITS, planes

_OP = Op("quantize_pack", reference.quantize_pack, mosaic_tpu=mosaic_tpu.kernel)


def quantize_pack(
    x: Float[Array, "B K S H"],
    valid: Bool[Array, "B K S"],
    *,
    bits: int,
    group: int,
    axis: Axis,
    scale_dtype,
    clip: float = 1.0,
    in_row: int = 1,
    implementation: Implementation | None = None,
) -> Packed:
    """Quantizes and packs keys or values group by group, in one pass.

    With `lo`, `hi` the extremes of a group's occupied entries, moved towards their middle until `clip` of the range is
    left: `scale = (hi - lo) / (2**bits - 1)`, `code = round((x - zero) / scale)` within 0 and `2**bits - 1`. `zero` is
    rounded down and `scale` up to `scale_dtype`, and codes are computed against the rounded values, so from `lo` to
    `hi` `|x - dequantized| <= scale / 2` whatever `scale_dtype`.

    Args:
      x: [B, K, S, H].
      valid: bool[B, K, S]; empty slots do not touch a group's extremes and get code 0.
      bits: 2, 3, 4 or 8.
      group: entries that share one scale: tokens for "channel", channels for "token".
      axis: "channel" has one scale per channel and group of `group` tokens (KIVI's keys); "token" one per
        token and group of `group` channels (KIVI's values).
      scale_dtype: floating dtype of `scale` and `zero`.
      clip: fraction of the range that codes span; below 1 outermost entries become less exact and all others more so.
      in_row: words of a channel that lie side by side; see `words_in_row`.
      implementation: which one, and no other. None: see `pallas_kernels.dispatch.Op`.

    Returns:
      `Packed`.

    Raises:
      ValueError: bits are unsupported, S or H is not a multiple of what the layout needs, or clip is outside (0, 1].
      NotImplementedError: the implementation asked for does not take these shapes.

    Source: Liu et al., KIVI (2024), section 3.
    """
    S, H = x.shape[2:]
    if not 0 < clip <= 1:
        raise ValueError(f"clip must be in (0, 1], got {clip}.")
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits must be 2, 3, 4 or 8, got {bits}.")
    per, words = WORD_BITS // min(planes(bits)), S * min(planes(bits)) // WORD_BITS
    if S % per:
        raise ValueError(f"slots must be a multiple of {per} for {bits}-bit words, got {S}.")
    if words % in_row:
        raise ValueError(f"in_row must divide the {words} words of a channel, got {in_row}.")
    length = S if axis == "channel" else H
    if length % group:
        raise ValueError(f"group must divide the {axis} group axis of length {length}, got {group}.")
    in_row = in_row if S else 1
    how = dict(bits=bits, group=group, axis=axis, scale_dtype=scale_dtype, clip=clip, in_row=in_row)
    return _OP(implementation, x, valid, **how)
