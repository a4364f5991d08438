"""A quantized segment with what its codes miss: outliers taken out before, and a low-rank part of the error."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.rope import Rope
from kvjax.segments.axes import OF_SLOTS, P
from kvjax.segments.dense import DenseSegment
from kvjax.segments.low_rank import Factors, add_product, factorize
from kvjax.segments.outliers import (
    Outliers,
    add_outliers,
    count_outliers,
    fill_outliers,
    find_outliers,
    take_outliers,
)
from kvjax.segments.protocol import KeyRope, Queries, Ranks, Segment
from kvjax.segments.slots import fold_slots
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Axis


@struct.dataclass
class Correction:
    """What is added to the dequantized keys, or values; None: nothing."""

    factors: Factors | None
    outliers: Outliers | None
    axis: Axis = struct.field(pytree_node=False)  # of the outliers


@struct.dataclass
class CorrectedSegment:
    """Slots `x ~ body + outliers + tokens^T channels`, block by block; the body of a `BufferedSegment`.

    Outliers of keys are sought along each channel of a block, those of values along each token. They are
    replaced by the mean of their vector before the rest is quantized, and stored as what the codes then miss.
    The low-rank part is that of the remaining error. All three are added to one tile of slots when it is read.

    Bytes, with rank r, factors of e bytes and n outliers of a vector of block (keys) or m of H channels (values):
    those of the body and
    `B * K * S * (2 * r * e * (1 + H / block) + (e + 1) * (n * H / block + m))`, one byte an index up to 256.
    """

    body: Segment
    keys: Correction
    values: Correction | None  # None: the keys are the values
    block: int = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)
    loops: int = struct.field(pytree_node=False)
    outliers: float = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    @classmethod
    def encode(
        cls,
        slots: DenseSegment,
        encode: Callable[[DenseSegment], Segment],
        *,
        block: int,
        rank: int,
        loops: int = 3,
        outliers: float = 0.0,
        dtype: str = "bfloat16",
    ) -> CorrectedSegment:
        """Quantizes dense slots and corrects what comes out.

        Args:
          slots: a multiple of `block` of them.
          encode: makes the body.
          block: tokens that share factors, and a channel's outliers; at most 65536.
          rank: of the factors; 0: none.
          loops: power iterations.
          outliers: fraction of a vector's entries, half of them its largest and half its smallest; 0: none.
          dtype: of factors and outliers.
        """
        occupied = slots.pos >= 0
        axes = {"k": "channel"} if slots.v is None else {"k": "channel", "v": "token"}
        exact = {name: getattr(slots, name).astype(jnp.float32) for name in axes}
        found, filled = {}, dict(exact)
        for name, axis in axes.items() if outliers else ():
            x = exact[name]
            count = count_outliers(outliers, block if axis == "channel" else x.shape[3])
            found[name] = find_outliers(x, occupied, count, axis=axis, block=block)
            filled[name] = fill_outliers(x, occupied, found[name], axis=axis, block=block)
        body = encode(slots.replace(**filled))
        restored = body.dense()

        def correct(name: str, axis: Axis) -> Correction:
            missed = jnp.where(occupied[..., None], exact[name] - getattr(restored, name), 0.0)
            taken = factors = None
            if outliers:
                taken = take_outliers(missed, found[name], axis=axis, block=block, dtype=dtype)
                missed = missed - add_outliers(jnp.zeros_like(missed), taken, axis=axis, block=block)
            if rank:
                factors = factorize(missed, rank=rank, block=block, loops=loops, dtype=dtype)
            return Correction(factors, taken, axis)

        values = correct("v", "token") if "v" in axes else None
        return cls(body, correct("k", "channel"), values, block, rank, loops, outliers, dtype)

    def encode_like(self, slots: DenseSegment) -> CorrectedSegment:
        """Encodes dense slots the way this segment is encoded."""
        return CorrectedSegment.encode(
            slots,
            self.body.encode_like,
            block=self.block,
            rank=self.rank,
            loops=self.loops,
            outliers=self.outliers,
            dtype=self.dtype,
        )

    def axes(self) -> CorrectedSegment:
        """See `Segment.axes`."""
        last = P("batch", "kv_heads", None, "slots")

        def axes(correction: Correction) -> Correction:
            along = last if correction.axis == "token" else OF_SLOTS
            return correction.replace(
                factors=correction.factors and Factors(last, OF_SLOTS),
                outliers=correction.outliers and Outliers(along, along),
            )

        return self.replace(body=self.body.axes(), keys=axes(self.keys), values=self.values and axes(self.values))

    @property
    def key_rope(self) -> KeyRope:
        """The body's."""
        return self.body.key_rope

    @property
    def pos(self) -> jax.Array:
        """i32[B, K, S]."""
        return self.body.pos

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: float | None = None,
        ranks: Ranks | None = None,
    ) -> Partial:
        """See `Segment.attend`."""
        dtype = queries.raw.dtype
        return self.fold_dense(lambda tile: tile.astype(dtype).attend(queries, window=window, scale=scale))

    def mass(self, queries: Queries, lse: jax.Array, **how) -> jax.Array:
        """See `Segment.mass`."""
        return self.dense().mass(queries, lse, **how)

    def dense(self) -> DenseSegment:
        """The dequantized and corrected slots, float32."""
        slots = self.body.dense()

        def corrected(x: jax.Array, by: Correction) -> jax.Array:
            if by.outliers is not None:
                x = add_outliers(x, by.outliers, axis=by.axis, block=self.block)
            if by.factors is not None:
                x = add_product(x, by.factors, block=self.block)
            return x

        values = self.values and corrected(slots.v, self.values)
        return slots.replace(k=corrected(slots.k, self.keys), v=values)

    def map_dense(self, body, tail) -> Segment:
        """Refused: its slots are compressed already."""
        raise ValueError("CorrectedSegment is compressed already; put this transform before the one that made it.")

    def fold_dense(self, attend, *beside) -> Partial:
        """See `Segment.fold_dense`."""
        return fold_slots(self, attend, beside, self.block)

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> CorrectedSegment:
        """Refused: a single token is no block."""
        raise TypeError("CorrectedSegment takes whole blocks; append through a BufferedSegment.")

    def reserve(self, tokens: int) -> CorrectedSegment:
        """Refused: see `append`."""
        raise TypeError("CorrectedSegment takes whole blocks; reserve through a BufferedSegment.")
