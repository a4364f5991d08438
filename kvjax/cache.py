"""The cache: an immutable pytree of layer caches, each a tuple of segments."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.rope import Rope
from kvjax.segments import DenseSegment, Queries, Ranks, Segment
from kvjax.segments.slots import token_order, written_after
from pallas_kernels.partial import Partial, combine


@struct.dataclass
class LayerCache:
    """What one layer remembers: segments over disjoint sets of slots, the last of them writable."""

    segments: tuple[Segment, ...]

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: float | None = None,
        shared: Any = None,
        new: Partial | None = None,
    ) -> Partial:
        """Attention over all slots: the merge of the segments' partial results.

        Args:
          queries: T queries of every row.
          window: tokens a query looks back over, itself included; None: all.
          scale: multiplies the dot products; None: `H ** -0.5`.
          shared: what layers share, from `Cache.shared`.
          new: attention over tokens that are not in the cache yet, merged with the rest.
        """
        partials = [
            s.attend(queries, window=window, scale=scale, shared=shared, **r)
            for s, r in zip(self.segments, self._ranks(queries))
            if s.pos.shape[-1]
        ]
        return combine(partials if new is None else [*partials, new])

    def mass(
        self,
        queries: Queries,
        lse: jax.Array,
        *,
        window: int | None = None,
        scale: float | None = None,
        shared: Any = None,
    ) -> tuple[jax.Array, ...]:
        """f32[B, N, S] per segment: the probability each slot received from the queries."""
        ranks = self._ranks(queries)
        return tuple(
            s.mass(queries, lse, window=window, scale=scale, shared=shared, **r)
            for s, r in zip(self.segments, ranks)
        )

    def append(
        self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope, *, after: Partial | None = None
    ) -> LayerCache:
        """Writes T new tokens into the last segment.

        Args:
          k: [B, K, T, H], un-rotated.
          v: [B, K, T, H].
          pos: i32[B, T], -1 for padding, which comes last.
          rope: rotates the keys.
          after: what was read from the cache before this write, so that it happens in place (`written_after`).
        """
        if after is not None and self.segments[-1].pos.shape[-1]:
            k, v, pos = written_after(after.out, k, v, pos)
        return self.with_tail(self.segments[-1].append(k, v, pos, rope))

    def with_tail(self, segment: Segment) -> LayerCache:
        """The same layer cache with another last segment."""
        return self.replace(segments=(*self.segments[:-1], segment))

    def _ranks(self, queries: Queries) -> list[dict[str, Ranks]]:
        if all(s.key_rope != "rank" for s in self.segments):
            return [{}] * len(self.segments)
        pos = jnp.concatenate([s.pos for s in self.segments], axis=-1)  # [B, K, S]
        slots = jnp.argsort(token_order(pos), axis=-1)
        earlier = (pos >= 0)[:, None] & (pos[:, None] < queries.pos[:, :, None, None])
        ahead = jnp.broadcast_to(queries.ahead, queries.pos.shape)[..., None]
        of_queries = jnp.sum(earlier, axis=-1) + ahead
        starts = [0]
        for s in self.segments:
            starts.append(starts[-1] + s.pos.shape[-1])
        return [
            {"ranks": Ranks(slots[..., a:b], of_queries)} if s.key_rope == "rank" else {}
            for s, a, b in zip(self.segments, starts, starts[1:])
        ]


@struct.dataclass
class Cache:
    """Layer caches, what layers share, and how far each sequence has come."""

    layers: tuple[LayerCache, ...]
    length: jax.Array  # i32[B], tokens seen; the position of the next token
    shared: Any = None

    def map_layers(self, fn, *rest) -> Cache:
        """Applies `fn(layer_cache, *entries)` to every layer, with the entries of `rest` at that layer."""
        return self.replace(layers=tuple(fn(*each) for each in zip(self.layers, *rest, strict=True)))

    def reserve(self, tokens: int) -> Cache:
        """Makes room for `tokens` more tokens in every layer. Changes shapes: not inside a loop."""
        return self.map_layers(lambda layer: layer.with_tail(layer.segments[-1].reserve(tokens)))


def empty_cache(
    *, batch: int, layers: int, kv_heads: int, head_dim: int, slots: int, dtype=jnp.float32
) -> Cache:
    """A dense cache with nothing in it.

    Bytes: `layers * batch * kv_heads * slots * (2 * head_dim * itemsize + 4) + 4 * batch`.

    Args:
      batch: [B].
      layers: [L].
      kv_heads: [K].
      head_dim: [H].
      slots: [S], tokens it can hold; 0 is allowed.
      dtype: of keys and values.
    """
    layer = lambda: LayerCache((DenseSegment.empty(batch, kv_heads, slots, head_dim, dtype),))
    return Cache(
        layers=tuple(layer() for _ in range(layers)), length=jnp.zeros((batch,), jnp.int32)
    )


def nbytes(tree: Any) -> int:
    """Bytes of the physical leaves of a cache, or of the shapes `jax.eval_shape` promises for one."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def kept_tokens(cache: Cache) -> jax.Array:
    """f32[B]: occupied slots per KV head, averaged over layers and heads."""
    per_layer = [
        sum(jnp.sum(s.pos >= 0, axis=(1, 2)) for s in layer.segments) / layer.segments[-1].pos.shape[1]
        for layer in cache.layers
    ]
    return jnp.mean(jnp.stack(per_layer), axis=0)
