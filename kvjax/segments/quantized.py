"""Slots stored as packed affine codes: keys per channel, values per token (KIVI's layout)."""

from __future__ import annotations

import math
import jax
from flax import struct

from kvjax.rope import Rope
from kvjax.segments.dense import DenseSegment
from kvjax.segments.protocol import KeyRope, Queries, Ranks, Segment
from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.partial import Partial, fold_tiles
from pallas_kernels.quantize_pack import Packed, dequantize, quantize_pack
from pallas_kernels.quantized_decode_attention import quantized_decode_attention

_TILE = 512  # slots that are dequantized at a time


@struct.dataclass
class QuantizedSegment:
    """The quantized body of a `BufferedSegment`: written block by block, never slot by slot.

    Keys share a scale over `key_group` tokens of a channel, values over `value_group` channels of a token.

    Bytes, with b bits and scales of e bytes:
    `B * K * S * (2 * H * b / 8 + 2 * e * H / key_group + 2 * e * H / value_group + 4)`.
    """

    k: Packed
    v: Packed
    pos: jax.Array  # i32[B, K, S]
    bits: int = struct.field(pytree_node=False)
    key_group: int = struct.field(pytree_node=False)
    value_group: int = struct.field(pytree_node=False)
    scale_dtype: str = struct.field(pytree_node=False, default="bfloat16")
    key_rope: KeyRope = struct.field(pytree_node=False, default="stored")

    @classmethod
    def encode(
        cls,
        slots: DenseSegment,
        *,
        bits: int,
        key_group: int,
        value_group: int,
        scale_dtype: str = "bfloat16",
    ) -> QuantizedSegment:
        """Quantizes dense slots; their number must be a multiple of `key_group`."""
        if slots.key_rope != "stored":
            raise TypeError(
                f"QuantizedSegment keeps rotated keys; got a segment with key_rope={slots.key_rope!r}."
            )
        occupied = slots.pos >= 0
        pack = lambda x, axis, group: quantize_pack(
            x, occupied, bits=bits, group=group, axis=axis, scale_dtype=scale_dtype
        )
        return cls(
            k=pack(slots.k, "channel", key_group),
            v=pack(slots.v, "token", value_group),
            pos=slots.pos,
            bits=bits,
            key_group=key_group,
            value_group=value_group,
            scale_dtype=scale_dtype,
        )

    def encode_like(self, slots: DenseSegment) -> QuantizedSegment:
        """Quantizes dense slots the way this segment is quantized."""
        return QuantizedSegment.encode(
            slots,
            bits=self.bits,
            key_group=self.key_group,
            value_group=self.value_group,
            scale_dtype=self.scale_dtype,
        )

    def slot_axes(self) -> QuantizedSegment:
        """For every leaf, the axis along which slots lie."""
        return self.replace(k=Packed(2, 2, 2), v=Packed(2, 3, 3), pos=2)

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: float | None = None,
        ranks: Ranks | None = None,
    ) -> Partial:
        """See `Segment.attend`."""
        return quantized_decode_attention(
            queries.rotated,
            self.k,
            self.v,
            queries.pos,
            self.pos,
            bits=self.bits,
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
    ) -> jax.Array:
        """See `Segment.mass`."""
        k = dequantize(self.k, bits=self.bits, axis="channel", dtype=queries.raw.dtype)
        return attention_mass(
            queries.rotated, k, queries.pos, self.pos, lse, window=window, scale=scale
        )

    def dense(self) -> DenseSegment:
        """The dequantized slots, float32."""
        return DenseSegment(
            k=dequantize(self.k, bits=self.bits, axis="channel"),
            v=dequantize(self.v, bits=self.bits, axis="token"),
            pos=self.pos,
        )

    def map_dense(self, body, tail) -> Segment:
        """Refused: its slots are compressed already."""
        raise ValueError("QuantizedSegment is compressed already; put this transform before the one that made it.")

    def fold_dense(self, attend, *beside) -> Partial:
        """See `Segment.fold_dense`."""

        def tile(start, size):
            def part(x, axis):
                per = self.pos.shape[2] // x.shape[axis]  # slots of an entry
                at, count = (start // per, size // per) if x.shape[axis] < self.pos.shape[2] else (start, size)
                return jax.lax.dynamic_slice_in_dim(x, at, count, axis=axis)

            return jax.tree.map(part, self, self.slot_axes()).dense(), *(part(x, 2) for x in beside)

        step = self.key_group * 32 // math.gcd(self.key_group, 32)  # whole groups and whole words
        return fold_tiles(lambda *of: attend(*tile(*of)), self.pos.shape[2], max(_TILE // step, 1) * step)

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> QuantizedSegment:
        """Refused: a single token has no group to share its key scales with."""
        raise TypeError("QuantizedSegment takes whole blocks; append through a BufferedSegment.")

    def reserve(self, tokens: int) -> QuantizedSegment:
        """Refused: see `append`."""
        raise TypeError("QuantizedSegment takes whole blocks; reserve through a BufferedSegment.")
