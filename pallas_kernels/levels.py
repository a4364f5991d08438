"""Numbers as codes of the nearest of a few levels, the same for all channels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.encoded import cut_slots
from pallas_kernels.words import WORD_BITS, pack_planes, planes, unpack_planes

_BITS = (2, 3, 4)


@struct.dataclass
class Levels:
    """Codes of `x[B, K, S, H]`: `x ~ table[code]`, with one table for all rows, heads and channels. See `Encoded`.

    Codes are packed along slots like those of `Packed`; 3 bits are planes of 2 and 1.

    Source: Lloyd, Least squares quantization in PCM (1982); Zandieh et al., TurboQuant (2025), arXiv:2504.19874.
    """

    planes: tuple[jax.Array, ...]  # of b bits each: u32[B, K, S * b / 32 / in_row, in_row * H]
    table: jax.Array  # f32[2**bits], ascending
    in_row: int = struct.field(pytree_node=False, default=1)  # runs of slots that lie side by side: `pack_planes`

    @property
    def bits(self) -> int:
        """Of a code: 2, 3 or 4."""
        return self.table.shape[0].bit_length() - 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, K, S, H)`."""
        B, K, rows, width = self.planes[0].shape
        return B, K, rows * (WORD_BITS // planes(self.bits)[0]) * self.in_row, width // self.in_row

    @property
    def block(self) -> int:
        """Slots that fill rows of words of every plane."""
        return WORD_BITS // min(planes(self.bits)) * self.in_row

    def cut(self, start: jax.Array | int, size: int) -> Levels:
        """See `Encoded.cut`."""
        per = (WORD_BITS // width * self.in_row for width in planes(self.bits))
        return self.replace(planes=tuple(cut_slots(x, start // n, size // n) for x, n in zip(self.planes, per)))

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """The levels."""
        code = unpack_planes(self.planes, self.bits, self.shape[3])
        found = list(self.table.astype(dtype))
        for bit in range(self.bits):  # twice as fast on CPU as a gather
            odd = (code >> bit) & 1 == 1
            found = [jnp.where(odd, found[i + 1], found[i]) for i in range(0, len(found), 2)]
        return found[0]


def nearest_levels(x: jax.Array, table: jax.Array, *, in_row: int = 1) -> Levels:
    """Replaces every number by the index of the nearest level, and packs the indices.

    `code = argmin_c |x - table[c]|`, ties to the lower index.

    Args:
      x: [B, K, S, H].
      table: f32[4], f32[8] or f32[16], ascending.
      in_row: runs of slots that lie side by side, see `pack_planes`; 2 where heads have 64 channels.

    Raises:
      ValueError: the table has another number of levels, or S does not fill rows of words.
    """
    if table.ndim != 1 or table.shape[0] not in [2**bits for bits in _BITS]:
        raise ValueError(f"table must be f32[4], f32[8] or f32[16], got shape {list(table.shape)}.")
    bits = table.shape[0].bit_length() - 1
    block = WORD_BITS // min(planes(bits)) * in_row
    if x.shape[2] % block:
        raise ValueError(f"slots must be a multiple of {block} for {bits}-bit levels, got {x.shape[2]}.")
    middles = (table[1:] + table[:-1]) / 2
    # Compared with every one of a few middles: a search would gather.
    code = jnp.sum(x.astype(jnp.float32)[..., None] > middles, axis=-1, dtype=jnp.uint32)
    return Levels(pack_planes(code, bits, in_row if x.shape[2] else 1), table, in_row if x.shape[2] else 1)
