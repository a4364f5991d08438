"""KV heads of a layer in different representations: full and streaming heads, heads of different ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int32

from kvjax import sharding
from kvjax.axes import rename
from kvjax.rope import Rope
from kvjax.segments.edits import Edit
from kvjax.segments.layouts import Rows
from kvjax.segments.protocol import AnySegment, KeyRope, Queries
from kvjax.segments.segment import Segment
from pallas_kernels.partial import Partial


@struct.dataclass
class HeadsSegment:
    """Parts over disjoint sets of KV heads, which are fixed when the cache is built.

    Bytes: those of the parts.
    """

    parts: tuple[AnySegment, ...]
    heads: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False)  # of each part; together 0 .. K - 1

    @classmethod
    def of(cls, slots: Segment, heads: tuple[tuple[int, ...], ...], encode) -> HeadsSegment:
        """Splits dense slots by head and encodes each part: `encode(part, index of the part) -> segment`."""
        used = [(index, of) for index, of in enumerate(heads) if of]
        part = lambda of: jax.tree.map(lambda x: x[:, np.array(of)], slots)
        return cls(tuple(encode(part(of), index) for index, of in used), tuple(tuple(of) for _, of in used))

    def axes(self) -> HeadsSegment:
        """See `AnySegment.axes`. Which head is in which part is fixed, so all are on every shard."""
        named = lambda i, part: rename(part.axes(), {"kv_heads": None, "slots": f"slots:{i}"})
        return self.replace(parts=tuple(named(i, part) for i, part in enumerate(self.parts)))

    @property
    def key_rope(self) -> KeyRope:
        """That of the parts."""
        return self.parts[0].key_rope

    @property
    def pos(self) -> Int32[Array, "B K S"]:
        """i32[B, K, S], S of the longest part; what shorter parts lack is empty."""
        return self._join([part.pos for part in self.parts], axis=1, fill=-1)

    def attend(self, queries: Queries, **how) -> Partial:
        """See `AnySegment.attend`."""
        _refuse_ranks(how)
        each = [part.attend(q, **how) for part, q in zip(self.parts, self._queries(queries))]
        return Partial(self._join_queries([p.out for p in each]), self._join_queries([p.lse for p in each]))

    def mass(self, queries: Queries, lse: jax.Array, **how) -> jax.Array:
        """See `AnySegment.mass`."""
        _refuse_ranks(how)
        each = [
            sharding.mass(part, q, part_lse, **how)
            for part, q, part_lse in zip(self.parts, self._queries(queries), self._split(lse))
        ]
        widest = max(x.shape[-1] for x in each)
        each = [jnp.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[-1]))) for x in each]
        return self._join_queries([x[:, None] for x in each])[:, 0]

    def dense(self) -> Segment:
        """All heads as one dense segment, float32."""
        parts = [part.dense().astype(jnp.float32) for part in self.parts]
        widest = max(part.pos.shape[2] for part in parts)
        parts = [part.resize(widest).with_slots(stats={}).replace(layout=Rows()) for part in parts]
        if any(part.bias is not None for part in parts):
            bias = lambda part: jnp.zeros(part.pos.shape, jnp.float32) if part.bias is None else part.bias
            parts = [part.with_slots(bias=bias(part)) for part in parts]
        return jax.tree.map(lambda *x: self._join(x, axis=1), *parts)

    def map_dense(self, body, tail) -> HeadsSegment:
        """See `AnySegment.map_dense`."""
        return self.replace(parts=tuple(part.map_dense(body, tail) for part in self.parts))

    def edited(self, edit: Edit) -> HeadsSegment:
        """See `AnySegment.edited`."""
        return self.replace(parts=tuple(part.edited(edit) for part in self.parts))

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> HeadsSegment:
        """See `AnySegment.append`."""
        of = lambda x, heads: x[:, np.array(heads)]
        parts = (part.append(of(k, h), of(v, h), pos, rope) for part, h in zip(self.parts, self.heads))
        return self.replace(parts=tuple(parts))

    def reserve(self, tokens: int) -> HeadsSegment:
        """See `AnySegment.reserve`."""
        return self.replace(parts=tuple(part.reserve(tokens) for part in self.parts))

    def _split(self, x: jax.Array) -> list[jax.Array]:
        """[B, T, N, ...] -> [B, T, n * G, ...] for the n heads of each part."""
        B, T, N = x.shape[:3]
        grouped = x.reshape(B, T, sum(map(len, self.heads)), -1, *x.shape[3:])
        return [grouped[:, :, np.array(h)].reshape(B, T, -1, *x.shape[3:]) for h in self.heads]

    def _queries(self, queries: Queries) -> list[Queries]:
        return [queries._replace(raw=raw) for raw in self._split(queries.raw)]

    def _join_queries(self, parts: list[jax.Array]) -> jax.Array:
        """The inverse of `_split`."""
        B, T = parts[0].shape[:2]
        grouped = [x.reshape(B, T, len(h), -1, *x.shape[3:]) for x, h in zip(parts, self.heads)]
        joined = self._join(grouped, axis=2)
        return joined.reshape(B, T, -1, *joined.shape[4:])

    def _join(self, parts: list[jax.Array], axis: int, fill: int | None = None) -> jax.Array:
        """Puts the heads of the parts, along `axis`, in their order; `fill` pads the last axis."""
        if fill is not None:
            widest = max(x.shape[-1] for x in parts)
            pad = lambda x: [(0, 0)] * (x.ndim - 1) + [(0, widest - x.shape[-1])]
            parts = [jnp.pad(x, pad(x), constant_values=fill) for x in parts]
        order = np.argsort(np.concatenate([np.array(h) for h in self.heads]))
        return jnp.take(jnp.concatenate(parts, axis=axis), order, axis=axis)


def _refuse_ranks(how: dict) -> None:
    if how.pop("ranks", None) is not None:
        raise TypeError("HeadsSegment does not re-index positions.")
