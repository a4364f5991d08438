"""Defines `product_quantize` and its inverse."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_pack.reference import WORD_BITS, pack, unpack

__all__ = ["WORD_BITS", "Codes", "planes", "product_quantize", "reconstruct"]

Codes = tuple[jax.Array, ...]
"""Codes of M sub-vectors a slot, packed along slots like those of `quantize_pack`.

Words have 8, 4 or 2 bits a slot; what has other numbers of bits is split into planes, low bits first: 12 are 8 and 4.
"""


def planes(bits: int) -> tuple[int, ...]:
    """Bits of every plane of a code."""
    return tuple(width for width in (8, 4, 2) if bits & width)


def product_quantize(x: jax.Array, valid: jax.Array, codebook: jax.Array, bits: int) -> Codes:
    """See `pallas_kernels.product_quantize.api.product_quantize`."""
    M, _, width = codebook.shape
    parts = x.astype(jnp.float32).reshape(*x.shape[:3], M, width)
    centroids = codebook.astype(jnp.float32)
    # Elementwise and summed by hand, so that XLA reduces distances as it computes them: as a matrix product they
    # would fill C / width times the memory of x.
    distance = sum(centroids[..., i] * (centroids[..., i] - 2 * parts[..., i, None]) for i in range(width))
    code = jnp.argmin(distance, axis=-1).astype(jnp.uint32)  # [B, K, S, M]
    code = jnp.where(valid[..., None], code, 0)
    packed = []
    for plane in planes(bits):
        packed.append(pack(code & (2**plane - 1), plane))
        code = code >> plane
    return tuple(packed)


def reconstruct(codes: Codes, codebook: jax.Array, dtype=jnp.float32) -> jax.Array:
    """See `pallas_kernels.product_quantize.api.reconstruct`."""
    M, C, width = codebook.shape
    code, shift = 0, 0
    for words, plane in zip(codes, planes(C.bit_length() - 1), strict=True):
        code = code | (unpack(words, plane) << shift)
        shift += plane
    rows = code + jnp.arange(M, dtype=jnp.uint32) * C
    x = jnp.take(codebook.reshape(M * C, width).astype(dtype), rows, axis=0, mode="clip")
    return x.reshape(*code.shape[:3], M * width)
