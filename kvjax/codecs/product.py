"""Product quantization: codes of the nearest centroid of each sub-vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.axes import OF_SLOTS, P
from pallas_kernels.product_quantize import Codes, code_bits, product_quantize, slots_of_a_word
from pallas_kernels.words import planes


@struct.dataclass
class Product:
    """M sub-vectors a slot, each one of C calibrated centroids, which rows and KV heads share.

    Bytes, with C = 2 ** b centroids of e-byte numbers: `B * K * S * M * b / 8` and `C * H * e` of centroids.
    """

    codes: Codes  # without slots its planes are None
    by_slot = True

    @classmethod
    def of(cls, codebook: jax.Array) -> Product:
        """Makes the codec of centroids [M, C, H / M].

        Raises:
          ValueError: the number of centroids is not one that packs.
        """
        return cls(Codes((None,) * len(planes(code_bits(codebook))), codebook))

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return slots_of_a_word(self.codes.bits)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return self.codes.shape

    def for_slots(self, slots: int, block: int | None = None) -> Product:
        """See `Encoded.for_slots`."""
        return self

    def like(self, x: jax.Array, occupied: jax.Array) -> Product:
        """See `Encoded.like`."""
        return Product(product_quantize(x, occupied, self.codes.codebook))

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        return self.codes.decode(dtype)

    def cut(self, start, size) -> Product:
        """See `Encoded.cut`."""
        return Product(self.codes.cut(start, size))

    def axes(self) -> Product:
        """See `Encoded.axes`; all shards have the centroids."""
        return Product(Codes((OF_SLOTS,) * len(self.codes.planes), P()))

    def fields(self) -> Product:
        """See `Encoded.fields`."""
        return Product(Codes(planes(self.codes.bits), 0))

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self.codes, None
