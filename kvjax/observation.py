"""What a transform may look at, and how it asks for it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.segments.protocol import Queries

ALL = -1
"""`Needs.queries` for every query of the call."""

Phase = Literal["prefill", "decode"]


class Needs(NamedTuple):
    """What a transform asks the decoder to collect; nothing else is."""

    queries: int = 0  # the last W queries of each row and their lse; ALL for every query

    def union(self, other: Needs) -> Needs:
        """What serves both."""
        widest = max(self.queries, other.queries)
        return Needs(queries=ALL if ALL in (self.queries, other.queries) else widest)


@struct.dataclass
class LayerObservation:
    """What one layer saw in the last call of the decoder."""

    queries: Queries  # W of them, un-rotated; padding (pos -1) where a row has fewer
    lse: jax.Array  # f32[B, W, N], over everything each query attended to
    layer: jax.Array  # i32[], its index
    window: int | None = struct.field(pytree_node=False, default=None)
    scale: float | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Observation:
    """What the whole decoder saw in its last call.

    `prompt` is the length of the whole prompt, known from the start even when it arrives in chunks:
    budgets that are fractions refer to it.
    """

    layers: tuple[LayerObservation, ...]
    new: jax.Array  # i32[B], tokens of this call
    prompt: jax.Array  # i32[B], tokens of the whole prompt
    prompt_slots: int = struct.field(pytree_node=False)  # the longest prompt of the batch, static
    phase: Phase = struct.field(pytree_node=False, default="prefill")


def last_queries(queries: Queries, lse: jax.Array, count: int) -> tuple[Queries, jax.Array]:
    """The last `count` real queries of every row (all of them for ALL), in order, right-aligned.

    Args:
      queries: raw [B, T, N, H], pos i32[B, T] with padding (-1) last.
      lse: f32[B, T, N].
      count: W, or ALL.

    Returns:
      The same with W = min(count, T) entries; a row with fewer real ones starts with padding.
    """
    T = queries.pos.shape[1]
    if count == ALL or count >= T:
        return queries._replace(ahead=0), lse
    real = jnp.sum(queries.pos >= 0, axis=1)
    index = real[:, None] - count + jnp.arange(count)  # [B, W]
    there = index >= 0
    index = jnp.maximum(index, 0)
    take = lambda x: jnp.take_along_axis(x, index[(...,) + (None,) * (x.ndim - 2)], axis=1)
    picked = Queries(take(queries.raw), jnp.where(there, take(queries.pos), -1), queries.rope)
    return picked, take(lse)
