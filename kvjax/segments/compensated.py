"""A ring whose overwritten tokens live on as their mean: a compensation token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int32

from kvjax import sharding
from kvjax.axes import rename
from kvjax.rope import Rope
from kvjax.segments.edits import Edit
from kvjax.segments.layouts import Rows
from kvjax.segments.moves import written_after
from kvjax.segments.protocol import KeyRope, Queries
from kvjax.segments.segment import Segment
from kvjax.segments.slots import LAST
from pallas_kernels.partial import Partial, combine


@struct.dataclass
class CompensatedSegment:
    """Sinks and a ring of the newest tokens, and one slot a KV head for all that the ring has dropped.

    That slot holds the mean key and the mean value of the N dropped tokens and counts N times in the softmax: its
    bias is `log N`. A token that the ring overwrites is averaged into it. It is float32, whatever the ring's dtype: a
    running mean over thousands of tokens moves by less than a 16-bit float resolves. Its position is that of the
    newest token it stands for, so that all queries that follow see it.

    Bytes: those of the ring and `B * K * (2 * H * 4 + 8)`.

    Source: Tang et al., RazorAttention (2024), arXiv:2407.15891, section 3.3.
    """

    ring: Segment  # [B, K, S - 1]
    mean: Segment  # [B, K, 1], float32

    @classmethod
    def of(cls, slots: Segment, ring: Segment) -> CompensatedSegment:
        """From dense slots with rotated keys, and the ring that keeps their sinks and their newest.

        Raises:
          TypeError: keys are not rotated where they are stored; a mean of others has no position to rotate to.
        """
        if slots.key_rope != "stored":
            raise TypeError(f"CompensatedSegment needs rotated keys, got key_rope={slots.key_rope!r}.")
        B, K, _, H = slots.k.shape
        mean = Segment.empty(B, K, 1, H, jnp.float32, own_values=slots.v is not None)
        empty = cls(ring, mean.with_slots(bias=jnp.zeros((B, K, 1), jnp.float32)))
        return empty.replace(mean=empty._mean_with(slots, _lost(slots, ring)))

    def axes(self) -> CompensatedSegment:
        """See `AnySegment.axes`; all shards have the mean."""
        return self.replace(ring=self.ring.axes(), mean=rename(self.mean.axes(), {"slots": None}))

    @property
    def key_rope(self) -> KeyRope:
        """Rotated."""
        return self.ring.key_rope

    @property
    def pos(self) -> Int32[Array, "B K S"]:
        """i32[B, K, S]."""
        return jnp.concatenate([self.ring.pos, self.mean.pos], axis=-1)

    def attend(self, queries: Queries, **how: Any) -> Partial:
        """See `AnySegment.attend`."""
        return combine([self.ring.attend(queries, **how), self.mean.attend(queries, **how)])

    def mass(self, queries: Queries, lse: jax.Array, **how: Any) -> jax.Array:
        """See `AnySegment.mass`."""
        return jnp.concatenate([sharding.mass(part, queries, lse, **how) for part in (self.ring, self.mean)], axis=-1)

    def dense(self) -> Segment:
        """The ring's slots and the mean, float32."""
        ring = self.ring.dense().astype(jnp.float32).with_slots(stats={}).replace(layout=Rows())
        if ring.bias is None:
            ring = ring.with_slots(bias=jnp.zeros(ring.pos.shape, jnp.float32))
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), ring, self.mean)

    def map_dense(self, body, tail) -> Segment:
        """See `AnySegment.map_dense`: the ring; the mean stays exact."""
        return self.replace(ring=self.ring.map_dense(body, tail))

    def edited(self, edit: Edit) -> CompensatedSegment:
        """See `AnySegment.edited`; the mean stands for tokens that cannot be taken out of it."""
        return self.replace(ring=self.ring.edited(edit), mean=self.mean.edited(edit))

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> CompensatedSegment:
        """See `AnySegment.append`."""
        if pos.shape[1] > 1:
            ring = self.ring.append(k, v, pos, rope)
            dense = self.ring.dense()
            held = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), dense, dense.slots_of(k, v, pos, rope))
            return self.replace(ring=ring, mean=self._mean_with(held, _lost(held, ring)))
        oldest = self.ring.oldest().dense()
        lost = (oldest.pos >= 0) & (pos >= 0)[:, None]
        # A branch of its own, or XLA reads the slot again after the write, from a copy of the ring.
        mean = jax.lax.cond(jnp.any(lost), lambda: self._mean_with(oldest, lost), lambda: self.mean)
        k, v, pos = written_after(mean.k + mean.values, k, v, pos)
        return self.replace(ring=self.ring.append(k, v, pos, rope), mean=mean)

    def reserve(self, tokens: int) -> CompensatedSegment:
        """It never grows."""
        return self

    def _mean_with(self, slots: Segment, lost: jax.Array) -> Segment:
        """The mean that also stands for the slots where bool[B, K, n] is true."""
        tokens = jnp.ones(lost.shape, jnp.float32) if slots.bias is None else jnp.exp(slots.bias)
        tokens = jnp.where(lost, tokens, 0.0)
        before = jnp.where(self.mean.pos >= 0, jnp.exp(self.mean.bias), 0.0)  # [B, K, 1]
        count = before + jnp.sum(tokens, axis=-1, keepdims=True)

        def averaged(mean, x):
            added = jnp.einsum("bkn,bknh->bkh", tokens, x.astype(jnp.float32))[:, :, None]
            return (before[..., None] * mean + added) / jnp.maximum(count, 1.0)[..., None]

        newest = jnp.max(jnp.where(lost, slots.pos, -1), axis=-1, keepdims=True, initial=-1)
        mean = self.mean.map_vectors(averaged, slots)
        return mean.with_slots(pos=jnp.maximum(self.mean.pos, newest), bias=jnp.log(jnp.maximum(count, 1.0)))


def _lost(held: Segment, ring: Segment) -> jax.Array:
    """bool[B, K, n]: which of the slots that were held the ring has dropped: those older than its oldest."""
    sinks = ring.layout.sinks
    oldest = jnp.min(jnp.where(ring.pos < sinks, LAST, ring.pos), axis=-1, keepdims=True)
    return (held.pos >= sinks) & (held.pos < oldest)
