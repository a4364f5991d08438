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
from pallas_kernels.quantize_pack import WORD_BITS, Axis, Packed, dequantize, quantize_pack
from pallas_kernels.quantized_decode_attention import quantized_decode_attention


@struct.dataclass
class QuantizedSegment:
    """The quantized body of a `BufferedSegment`: written block by block, never slot by slot.

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
        scale_dtype: str = "bfloat16",
        key_axis: Axis = "channel",
        clip: float = 1.0,
    ) -> QuantizedSegment:
        """Quantizes dense slots: whole words of them and, for keys per channel, a multiple of `key_group`."""
        if slots.key_rope != "stored":
            raise TypeError(
                f"QuantizedSegment keeps rotated keys; got a segment with key_rope={slots.key_rope!r}."
            )

        def pack(slots: DenseSegment) -> QuantizedSegment:
            how = dict(bits=bits, scale_dtype=scale_dtype, clip=clip)
            occupied = slots.pos >= 0
            return cls(
                k=quantize_pack(slots.k, occupied, group=key_group, axis=key_axis, **how),
                v=None if slots.v is None else quantize_pack(slots.v, occupied, group=value_group, axis="token", **how),
                pos=slots.pos,
                key_group=key_group,
                value_group=value_group,
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
            scale_dtype=self.scale_dtype,
            key_axis=self.key_axis,
            clip=self.clip,
        )

    def axes(self) -> QuantizedSegment:
        """See `Segment.axes`."""
        of_token = P("batch", "kv_heads", None, "slots")
        by = {"channel": Packed(OF_SLOTS, OF_SLOTS, OF_SLOTS), "token": Packed(OF_SLOTS, of_token, of_token)}
        bias = None if self.bias is None else OF_SLOTS
        return self.replace(k=by[self.key_axis], v=self.v and by["token"], pos=OF_SLOTS, bias=bias)

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
        # Whole groups and whole words.
        step = math.lcm(self.key_group if self.key_axis == "channel" else 1, WORD_BITS // self.bits)
        return fold_slots(self, attend, beside, step)

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> QuantizedSegment:
        """Refused: a single token has no group to share its key scales with."""
        raise TypeError("QuantizedSegment takes whole blocks; append through a BufferedSegment.")

    def reserve(self, tokens: int) -> QuantizedSegment:
        """Refused: see `append`."""
        raise TypeError("QuantizedSegment takes whole blocks; reserve through a BufferedSegment.")
