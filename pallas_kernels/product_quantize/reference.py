"""Defines `product_quantize`, and what its codes stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.encoded import cut_slots
from pallas_kernels.words import WORD_BITS, pack_planes, planes, unpack_planes


@struct.dataclass
class Codes:
    """Codes of the nearest centroids of M sub-vectors a slot, with their codebook. See `Encoded`.

    Codes are packed along slots like those of `quantize_pack`. Words have 8, 4 or 2 bits a slot; what has other numbers
    of bits is split into planes, low bits first: 12 are 8 and 4.
    """

    planes: tuple[jax.Array, ...]  # of b bits each: u32[B, K, S * b / 32, M]
    codebook: jax.Array  # [M, C, H / M]

    @property
    def bits(self) -> int:
        """Of a code: C is `2**bits`."""
        return self.codebook.shape[1].bit_length() - 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, K, S, H)`."""
        B, K, rows, M = self.planes[0].shape
        return B, K, rows * (WORD_BITS // planes(self.bits)[0]), M * self.codebook.shape[2]

    @property
    def block(self) -> int:
        """Slots that fill words of every plane."""
        return WORD_BITS // min(planes(self.bits))

    def cut(self, start: jax.Array | int, size: int) -> Codes:
        """See `Encoded.cut`."""
        per = (WORD_BITS // width for width in planes(self.bits))
        return self.replace(planes=tuple(cut_slots(x, start // n, size // n) for x, n in zip(self.planes, per)))

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """The centroids."""
        M, C, width = self.codebook.shape
        rows = unpack_planes(self.planes, self.bits, M) + jnp.arange(M, dtype=jnp.uint32) * C
        x = jnp.take(self.codebook.reshape(M * C, width).astype(dtype), rows, axis=0, mode="clip")
        return x.reshape(*rows.shape[:3], M * width)


def product_quantize(x: jax.Array, valid: jax.Array, codebook: jax.Array, bits: int) -> Codes:
    """See `pallas_kernels.product_quantize.api.product_quantize`."""
    M, _, width = codebook.shape
    parts = x.astype(jnp.float32).reshape(*x.shape[:3], M, width)
    centroids = codebook.astype(jnp.float32)
    # Elementwise and summed by hand, so that XLA reduces distances as it computes them: as a matrix product they
    # would fill C / width times the memory of x.
    distance = sum(centroids[..., i] * (centroids[..., i] - 2 * parts[..., i, None]) for i in range(width))
    code = jnp.argmin(distance, axis=-1).astype(jnp.uint32)  # [B, K, S, M]
    return Codes(pack_planes(jnp.where(valid[..., None], code, 0), bits), codebook)
