"""Slots stored as codes of centroids: product quantization."""

from __future__ import annotations

import jax
from flax import struct

from kvjax.rope import Rope
from kvjax.segments.axes import OF_SLOTS, P
from kvjax.segments.dense import DenseSegment
from kvjax.segments.protocol import KeyRope, Queries, Ranks, Segment
from kvjax.segments.slots import fold_slots
from pallas_kernels.attention_mass import Reduce, attention_mass
from pallas_kernels.codebook_decode_attention import codebook_decode_attention
from pallas_kernels.partial import Partial
from pallas_kernels.product_quantize import Codes, product_quantize

_WHOLE = 8  # slots that fill words of every plane of codes


@struct.dataclass
class CodebookSegment:
    """The product-quantized body of a `BufferedSegment`: written block by block, never slot by slot.

    All rows and KV heads share the codebooks, which the codes carry.

    Bytes, with M sub-vectors and C = 2 ** b centroids of e-byte numbers: `B * K * S * (2 * M * b / 8 + 4)` and
    `2 * C * H * e` of codebooks.
    """

    k: Codes
    v: Codes
    pos: jax.Array  # i32[B, K, S]
    key_rope: KeyRope = struct.field(pytree_node=False, default="stored")

    @classmethod
    def encode(cls, slots: DenseSegment, key_codebook: jax.Array, value_codebook: jax.Array) -> CodebookSegment:
        """Encodes dense slots; their number must fill whole words."""
        if slots.bias is not None:
            raise TypeError("CodebookSegment cannot keep slots that stand for several tokens.")
        if slots.key_rope != "stored":
            raise TypeError(f"CodebookSegment keeps rotated keys; got a segment with key_rope={slots.key_rope!r}.")
        occupied = slots.pos >= 0
        return cls(
            k=product_quantize(slots.k, occupied, key_codebook),
            v=product_quantize(slots.values_apart("A codebook of the values"), occupied, value_codebook),
            pos=slots.pos,
        )

    def encode_like(self, slots: DenseSegment) -> CodebookSegment:
        """Encodes dense slots with this segment's codebooks."""
        return CodebookSegment.encode(slots, self.k.codebook, self.v.codebook)

    def axes(self) -> CodebookSegment:
        """See `Segment.axes`; all shards have the codebooks."""
        axes = jax.tree.map(lambda _: OF_SLOTS, self)
        return axes.replace(k=axes.k.replace(codebook=P()), v=axes.v.replace(codebook=P()))

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: float | None = None,
        ranks: Ranks | None = None,
    ) -> Partial:
        """See `Segment.attend`."""
        return codebook_decode_attention(
            queries.rotated,
            self.k,
            self.v,
            queries.pos,
            self.pos,
            window=window,
            scale=scale,
        )

    def mass(
        self,
        queries: Queries,
        lse: jax.Array,
        *,
        window: int | None = None,
        scale: float | None = None,
        ranks: Ranks | None = None,
        reduce: Reduce = "sum",
    ) -> jax.Array:
        """See `Segment.mass`."""
        k = self.k.decode(queries.raw.dtype)
        return attention_mass(queries.rotated, k, queries.pos, self.pos, lse, window=window, scale=scale, reduce=reduce)

    def dense(self) -> DenseSegment:
        """The centroids, float32."""
        return DenseSegment(k=self.k.decode(), v=self.v.decode(), pos=self.pos)

    def map_dense(self, body, tail) -> Segment:
        """Refused: its slots are compressed already."""
        raise ValueError("CodebookSegment is compressed already; put this transform before the one that made it.")

    def fold_dense(self, attend, *beside) -> Partial:
        """See `Segment.fold_dense`."""
        return fold_slots(self, attend, beside, _WHOLE)

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> CodebookSegment:
        """Refused: words hold several slots."""
        raise TypeError("CodebookSegment takes whole blocks; append through a BufferedSegment.")

    def reserve(self, tokens: int) -> CodebookSegment:
        """Refused: see `append`."""
        raise TypeError("CodebookSegment takes whole blocks; reserve through a BufferedSegment.")
