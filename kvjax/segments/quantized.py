"""Slots stored as packed affine codes: keys per channel (KIVI's layout) or per token, values per token."""

from __future__ import annotations

import math

import jax
from flax import struct

from kvjax import sharding
from kvjax.rope import Rope
from kvjax.segments.axes import OF_SLOTS, P
from kvjax.segments.dense import DenseSegment
from kvjax.segments.protocol import KeyRope, Queries, Ranks, Segment
from kvjax.segments.slots import fold_slots
from pallas_kernels.attention_mass import Reduce, attention_mass
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import WORD_BITS, Axis, Packed, dequantize, quantize_pack, words_in_row
from pallas_kernels.quantized_decode_attention import quantized_decode_attention
from pallas_kernels.ragged_decode_attention import PageRun
from pallas_kernels.ragged_quantized_decode_attention import as_pages, in_a_row, ragged_quantized_decode_attention


def fewest_slots(bits: int, key_group: int, key_axis: Axis) -> int:
    """Slots of whole words and, for keys per channel, of whole groups."""
    return math.lcm(key_group if key_axis == "channel" else 1, WORD_BITS // bits)


@struct.dataclass
class QuantizedSegment:
    """The quantized body of a `BufferedSegment`: written block by block, never slot by slot.

    Where a head has fewer channels than a TPU has lanes, words of a block lie side by side, see `words_in_row`.

    Keys share a scale over `key_group` tokens of a channel or, with `key_axis="token"`, over `key_group` channels
    of a token; values over `value_group` channels of a token. Keys that are the values, too, are stored once.

    Bytes, with b bits and scales of e bytes:
    `B * K * S * (2 * H * b / 8 + 2 * e * H / key_group + 2 * e * H / value_group + 4 + (4 if bias))`.
    """

    k: Packed
    v: Packed | None  # None: the keys are the values
    pos: jax.Array  # i32[B, K, S]
    bits: int = struct.field(pytree_node=False)
    key_group: int = struct.field(pytree_node=False)
    value_group: int = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)  # slots that are written, or cut off, at a time
    scale_dtype: str = struct.field(pytree_node=False, default="bfloat16")
    key_axis: Axis = struct.field(pytree_node=False, default="channel")
    clip: float = struct.field(pytree_node=False, default=1.0)  # see `quantize_pack`
    key_rope: KeyRope = struct.field(pytree_node=False, default="stored")
    bias: jax.Array | None = None  # f32[B, K, S], as in `DenseSegment`

    @classmethod
    def encode(
        cls,
        slots: DenseSegment,
        *,
        bits: int,
        key_group: int,
        value_group: int,
        block: int | None = None,
        scale_dtype: str = "bfloat16",
        key_axis: Axis = "channel",
        clip: float = 1.0,
    ) -> QuantizedSegment:
        """Quantizes dense slots: whole blocks, each of whole words and, for keys per channel, of whole groups."""
        block = fewest_slots(bits, key_group, key_axis) if block is None else block
        if slots.key_rope != "stored":
            raise TypeError(
                f"QuantizedSegment keeps rotated keys; got a segment with key_rope={slots.key_rope!r}."
            )

        def pack(slots: DenseSegment) -> QuantizedSegment:
            how = dict(bits=bits, scale_dtype=scale_dtype, clip=clip)

            def packed(x: jax.Array, axis: Axis, group: int) -> Packed:
                in_row = words_in_row(x.shape[3], block * bits // WORD_BITS)
                return quantize_pack(x, slots.pos >= 0, axis=axis, group=group, in_row=in_row, **how)

            return cls(
                k=packed(slots.k, key_axis, key_group),
                v=None if slots.v is None else packed(slots.v, "token", value_group),
                pos=slots.pos,
                key_group=key_group,
                value_group=value_group,
                block=block,
                bias=slots.bias,
                key_axis=key_axis,
                **how,
            )

        return sharding.made_on_shards(pack, slots.replace(stats={}))

    def encode_like(self, slots: DenseSegment) -> QuantizedSegment:
        """Quantizes dense slots the way this segment is quantized."""
        return QuantizedSegment.encode(
            slots,
            bits=self.bits,
            key_group=self.key_group,
            value_group=self.value_group,
            block=self.block,
            scale_dtype=self.scale_dtype,
            key_axis=self.key_axis,
            clip=self.clip,
        )

    def axes(self) -> QuantizedSegment:
        """See `Segment.axes`."""
        affine = {"channel": OF_SLOTS, "token": P("batch", "kv_heads", None, "slots")}
        k, v = (x and x.replace(words=OF_SLOTS, affine=affine[x.axis]) for x in (self.k, self.v))
        return self.replace(k=k, v=v, pos=OF_SLOTS, bias=None if self.bias is None else OF_SLOTS)

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
            bias=self.bias,
            key_axis=self.key_axis,
            window=window,
            scale=scale,
        )

    def attend_owned(
        self,
        queries: Queries,
        owner: jax.Array,
        kv_heads: int,
        *,
        run: PageRun | None = None,
        window: int | None = None,
        scale: float | None = None,
    ) -> Partial:
        """See `DenseSegment.attend_owned`; pages are of whole blocks."""
        how = dict(kv_heads=kv_heads, bits=self.bits, key_axis=self.key_axis, run=run, window=window, scale=scale)
        pos, bias = (None if x is None else x[:, 0] for x in (self.pos, self.bias))
        return ragged_quantized_decode_attention(
            queries.rotated, self.k, self.v, owner, queries.pos, pos, bias=bias, **how
        )

    def in_a_row(self) -> QuantizedSegment:
        """See `DenseSegment.in_a_row`."""
        return self._laid_out(in_a_row, lambda x: x.reshape(x.shape[0], 1, -1))

    def as_pages(self, pages: int) -> QuantizedSegment:
        """The inverse of `in_a_row`."""
        return self._laid_out(lambda x, axis: as_pages(x, pages, axis), lambda x: x.reshape(x.shape[0], pages, -1))

    def _laid_out(self, packed, per_slot) -> QuantizedSegment:
        bias = None if self.bias is None else per_slot(self.bias)
        k, v = packed(self.k, self.key_axis), packed(self.v, "token")
        return self.replace(k=k, v=v, pos=per_slot(self.pos), bias=bias)

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
        k = dequantize(self.k, bits=self.bits, axis=self.key_axis, dtype=queries.raw.dtype)
        return attention_mass(
            queries.rotated,
            k,
            queries.pos,
            self.pos,
            lse,
            bias=self.bias,
            window=window,
            scale=scale,
            reduce=reduce,
        )

    def dense(self) -> DenseSegment:
        """The dequantized slots, float32."""
        return DenseSegment(
            k=dequantize(self.k, bits=self.bits, axis=self.key_axis),
            v=None if self.v is None else dequantize(self.v, bits=self.bits, axis="token"),
            pos=self.pos,
            bias=self.bias,
        )

    def map_dense(self, body, tail) -> Segment:
        """Refused: its slots are compressed already."""
        raise ValueError("QuantizedSegment is compressed already; put this transform before the one that made it.")

    def fold_dense(self, attend, *beside) -> Partial:
        """See `Segment.fold_dense`."""
        return fold_slots(self, attend, beside, self.block)

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> QuantizedSegment:
        """Refused: a single token has no group to share its key scales with."""
        raise TypeError("QuantizedSegment takes whole blocks; append through a BufferedSegment.")

    def reserve(self, tokens: int) -> QuantizedSegment:
        """Refused: see `append`."""
        raise TypeError("QuantizedSegment takes whole blocks; reserve through a BufferedSegment.")
