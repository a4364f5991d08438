"""Chooses an implementation of `product_quantize`."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float

from pallas_kernels.product_quantize import reference
from pallas_kernels.product_quantize.reference import Codes
from pallas_kernels.words import WORD_BITS, planes


def product_quantize(
    x: Float[Array, "B K S H"], valid: Bool[Array, "B K S"], codebook: Float[Array, "M C H/M"]
) -> Codes:
    """Replaces each of M sub-vectors by the index of its nearest centroid, and packs the indices.

    `code[m] = argmin_c |x_m - codebook[m, c]|^2` in float32, ties to the lower index.

    Args:
      x: [B, K, S, H].
      valid: bool[B, K, S]; empty slots get code 0.
      codebook: [M, C, H / M] centroids; C is 2 to the power of an even number of bits from 2 to 14.

    Returns:
      `Codes`, with the codebook.

    Raises:
      ValueError: the codebook does not fit x, or S is not a multiple of the slots of a word.

    Source: Jegou et al., Product Quantization for Nearest Neighbor Search (2011), section II.
    """
    S, H = x.shape[2:]
    bits = code_bits(codebook)
    M, _, width = codebook.shape
    if M * width != H:
        raise ValueError(f"codebook must cover {H} channels, got {M} sub-vectors of {width}.")
    if S % slots_of_a_word(bits):
        raise ValueError(f"slots must be a multiple of {slots_of_a_word(bits)} for codes of {bits} bits, got {S}.")
    return reference.product_quantize(x, valid, codebook, bits)


def code_bits(codebook: jax.Array) -> int:
    """Bits of a code.

    Raises:
      ValueError: the number of centroids is not one that packs.
    """
    count = codebook.shape[1]
    bits = count.bit_length() - 1
    if count != 2**bits or bits % 2 or not 2 <= bits <= 14:
        raise ValueError(f"codebook must have 4, 16, 64, ... or 16384 centroids, got {count}.")
    return bits


def slots_of_a_word(bits: int) -> int:
    """Slots that share words: a segment's slots come in multiples of it."""
    return WORD_BITS // min(planes(bits))
