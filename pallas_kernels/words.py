"""Packs small codes into 32-bit words along the slot axis, and unpacks them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.tpu_tiles import LANES

WORD_BITS = 32


def pack(code: jax.Array, bits: int) -> jax.Array:
    """u32[B, K, S, H] codes below `2**bits` -> u32[B, K, S * bits / 32, H] words, low bits first."""
    B, K, S, H = code.shape
    per = WORD_BITS // bits
    shifts = (jnp.arange(per, dtype=jnp.uint32) * bits)[:, None]
    fields = code.reshape(B, K, S // per, per, H) << shifts
    return jnp.sum(fields, axis=3, dtype=jnp.uint32)  # fields do not overlap: the sum is their union


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`: u32[B, K, S, H] codes."""
    B, K, W, H = words.shape
    per = WORD_BITS // bits
    shifts = (jnp.arange(per, dtype=jnp.uint32) * bits)[:, None]
    return ((words[:, :, :, None] >> shifts) & (2**bits - 1)).reshape(B, K, W * per, H)


def words_in_row(channels: int, words: int) -> int:
    """How many words of a channel lie side by side, if pieces of `words` words are written and read on their own."""
    return math.gcd(LANES // channels, words) if LANES % channels == 0 else 1


def planes(bits: int) -> tuple[int, ...]:
    """Returns the widths of the planes that a code is split into, low bits first: 12 bits are 8 and 4."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack_planes(code: jax.Array, bits: int, in_row: int = 1) -> tuple[jax.Array, ...]:
    """Packs codes of any number of bits up to 15, one array of words a plane.

    Args:
      code: u32[B, K, S, H] below `2**bits`; S must fill whole rows of words of every plane.
      bits: of a code.
      in_row: runs of slots that lie side by side, each of as many as a word of the widest plane holds.

    Returns:
      For every plane of b bits u32[B, K, S * b / 32 / in_row, in_row * H].
    """
    B, K, S, H = code.shape
    runs = code.reshape(B, K, -1, in_row, WORD_BITS // planes(bits)[0], H).swapaxes(3, 4)
    code, packed = runs.reshape(B, K, S // in_row, in_row * H), []
    for plane in planes(bits):
        packed.append(pack(code & (2**plane - 1), plane))
        code = code >> plane
    return tuple(packed)


def unpack_planes(words: Sequence[jax.Array], bits: int, channels: int) -> jax.Array:
    """The inverse of `pack_planes`: u32[B, K, S, channels] codes."""
    code, shift = 0, 0
    for x, plane in zip(words, planes(bits), strict=True):
        code = code | (unpack(x, plane) << shift)
        shift += plane
    B, K, rows, width = code.shape
    runs = code.reshape(B, K, -1, WORD_BITS // planes(bits)[0], width // channels, channels).swapaxes(3, 4)
    return runs.reshape(B, K, rows * width // channels, channels)
