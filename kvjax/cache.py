"""The cache: an immutable pytree of layer caches, each a tuple of segments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from kvjax import sharding
from kvjax.rope import Rope
from kvjax.segments import AnySegment, Queries, Ranks, Rewrite, Segment
from kvjax.segments.indices import Chosen, bytes_of
from kvjax.segments.moves import written_after
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial, combine

Shared = dict[str, AnySegment]
"""Segments that several layers read, by name."""


@struct.dataclass
class LayerCache:
    """What one layer remembers: segments over disjoint sets of slots, the last of them writable."""

    segments: tuple[AnySegment, ...]

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: Scale | None = None,
        shared: Shared | None = None,
        new: Partial | None = None,
        chosen: Chosen | None = None,
    ) -> Partial:
        """Attention over all slots: the merge of the segments' partial results.

        Args:
          queries: T queries of every row.
          window: tokens a query looks back over, itself included; None: all.
          scale: multiplies the dot products, and may cap them; None: `H ** -0.5`.
          shared: what layers share, `Cache.shared`.
          new: attention over tokens that are not in the cache yet, merged with the rest.
          chosen: what `choose` returned for these queries; None: asked here.
        """
        layer = self.inlined(shared)
        chosen = layer.choose(queries, window=window) if chosen is None else chosen
        partials = [
            sharding.attend(s, queries, window=window, scale=scale, **r, **({"chosen": chosen} if _selects(s) else {}))
            for s, r in zip(layer.segments, layer._ranks(queries))
            if s.pos.shape[-1]
        ]
        return combine(partials if new is None else [*partials, new])

    def choose(
        self, queries: Queries, *, window: int | None = None, given: Chosen | None = None
    ) -> Chosen | None:
        """Returns the pages that the queries read, where a segment is read page by page; otherwise what is given.

        Args:
          queries: T queries of every row.
          window: see `attend`.
          given: the choice of an earlier layer.
        """
        for segment in filter(_selects, self.segments):
            given = segment.choose(queries, window=window, given=given)
        return given

    def mass(
        self,
        queries: Queries,
        lse: jax.Array,
        *,
        window: int | None = None,
        scale: Scale | None = None,
        shared: Shared | None = None,
    ) -> tuple[jax.Array, ...]:
        """f32[B, N, S] per segment: the probability each slot received from the queries."""
        layer = self.inlined(shared)
        return tuple(
            sharding.mass(s, queries, lse, window=window, scale=scale, **r)
            for s, r in zip(layer.segments, layer._ranks(queries))
        )

    def append(
        self,
        k: Float[Array, "B K T H"],
        v: Float[Array, "B K T H"],
        pos: Int32[Array, "B T"],
        rope: Rope,
        *,
        after: Partial | None = None,
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

    def inlined(self, shared: Shared | None) -> LayerCache:
        """The same with every `LayerView` replaced by the segment that it is of what layers share."""
        if not shared:
            return self
        views = (getattr(s, "inlined", None) for s in self.segments)
        return self.replace(segments=tuple(view(shared) if view else s for s, view in zip(self.segments, views)))

    def map_dense(self, body: Rewrite, tail: Rewrite) -> LayerCache:
        """Rewrites dense slots: with `tail` those that tokens are appended to, with `body` all others."""
        *written, last = self.segments
        return self.replace(segments=(*(s.map_dense(body, body) for s in written), last.map_dense(body, tail)))

    def with_tail(self, segment: AnySegment) -> LayerCache:
        """The same layer cache with another last segment."""
        return self.replace(segments=(*self.segments[:-1], segment))

    def _ranks(self, queries: Queries) -> list[dict[str, Ranks]]:
        has_ranks = lambda s: s.key_rope in ("rank", "window")  # a prefix of rotated keys has none
        ranked = [s for s in self.segments if has_ranks(s)]
        if not ranked:
            return [{}] * len(self.segments)
        pos = jnp.concatenate([s.pos for s in ranked], axis=-1)  # [B, K, S]
        ranks, each, start = Ranks.of(pos, queries), [], 0
        for s in self.segments:
            end = start + (s.pos.shape[-1] if has_ranks(s) else 0)
            each.append({"ranks": ranks._replace(slots=ranks.slots[..., start:end])} if has_ranks(s) else {})
            start = end
        return each


@struct.dataclass
class Cache:
    """Layer caches, what layers share, and how far each sequence has come."""

    layers: tuple[LayerCache, ...]
    length: Int32[Array, " B"]  # tokens seen; the position of the next token
    shared: Shared = struct.field(default_factory=dict)

    def map_layers(self, fn, *rest) -> Cache:
        """Applies `fn(layer_cache, *entries)` to every layer, with the entries of `rest` at that layer."""
        return self.replace(layers=tuple(fn(*each) for each in zip(self.layers, *rest, strict=True)))

    def map_shared(self, fn: Rewrite) -> Cache:
        """Applies `fn(segment)` to everything that layers share."""
        return self.replace(shared={name: fn(segment) for name, segment in self.shared.items()})

    def inlined(self) -> Cache:
        """The same slots with nothing shared: what to look at, not what to store."""
        return self.map_layers(lambda layer: layer.inlined(self.shared)).replace(shared={})

    def specs(self) -> Cache:
        """For every leaf, the `PartitionSpec` over the axes of the mesh in use: see `kvjax.sharding`."""

        def of_layer(layer: LayerCache) -> LayerCache:
            return LayerCache(tuple(map(of_segment, layer.segments, layer.inlined(self.shared).segments)))

        def of_segment(segment: AnySegment, whole: AnySegment) -> AnySegment:
            return sharding.specs(segment.axes(), segment, sharding.layout(sharding.sizes_of(whole.axes(), whole)))

        shared = {name: of_segment(segment, segment) for name, segment in self.shared.items()}
        length = sharding.specs(P("batch"), self.length)
        return self.map_layers(of_layer).replace(length=length, shared=shared)

    def constrained(self) -> Cache:
        """The same, on a mesh with every leaf split as `specs` says."""
        return sharding.constrain_tree(self, Cache.specs)

    def reserve(self, tokens: int) -> Cache:
        """Makes room for `tokens` more tokens in every layer. Changes shapes: not inside a loop."""
        return self.map_layers(lambda layer: layer.with_tail(layer.segments[-1].reserve(tokens)))


def empty_cache(
    *,
    batch: int,
    layers: int,
    kv_heads: int,
    head_dim: int,
    slots: int,
    dtype=jnp.float32,
    own_values: bool = True,
) -> Cache:
    """A dense cache with nothing in it.

    Bytes: `layers * batch * kv_heads * slots * (2 * head_dim * itemsize + 4) + 4 * batch`, without values of
    their own `head_dim` in place of `2 * head_dim`.

    Args:
      batch: [B].
      layers: [L].
      kv_heads: [K].
      head_dim: [H].
      slots: [S], tokens it can hold; 0 is allowed.
      dtype: of keys and values.
      own_values: False where the keys are the values (multi-head latent attention).
    """
    layer = lambda: LayerCache(
        (Segment.empty(batch, kv_heads, slots, head_dim, dtype, own_values=own_values),)
    )
    return Cache(
        layers=tuple(layer() for _ in range(layers)), length=jnp.zeros((batch,), jnp.int32)
    )


def nbytes(tree: Any) -> int:
    """Bytes of the physical leaves of a cache, or of the shapes `jax.eval_shape` promises for one."""
    return bytes_of(tree)


def bytes_read(cache: Cache, queries: int = 1) -> int:
    """Bytes of a cache that attention reads in a call, from its leaves or from the shapes of them.

    Everything that is stored, once, but of what is read page by page (`select`) the chosen pages and what chooses them.
    Bookkeeping of writes is not counted.

    Args:
      cache: whole, or as `jax.eval_shape` promises it.
      queries: tokens of the call.
    """
    return sum(getattr(s, "bytes_read", lambda _: nbytes(s))(queries) for s in segments_read(cache))


def bytes_on_host(cache: Cache) -> int:
    """Bytes of a cache that are kept in host memory (`select(hosted=True)`); `nbytes` counts them, too.

    Args:
      cache: whole, or as `jax.eval_shape` promises it.
    """
    segments = [*(s for layer in cache.layers for s in layer.segments), *cache.shared.values()]
    return sum(getattr(s, "bytes_on_host", lambda: 0)() for s in segments)


def segments_read(cache: Cache) -> list[AnySegment]:
    """The segments that a call reads: one that layers share as often as it is read, a pool once."""
    views = [view for layer in cache.layers for view in layer.segments]
    pools = list(cache.shared.values()) if any(getattr(view, "of_pool", False) for view in views) else []
    own = [
        segment
        for layer in cache.layers
        for view, segment in zip(layer.segments, layer.inlined(cache.shared).segments)
        if not getattr(view, "of_pool", False)  # a layer reads its part of a pool
    ]
    return pools + own


def _selects(segment: AnySegment) -> bool:
    return getattr(segment, "selects", False)


def kept_tokens(cache: Cache) -> Float32[Array, " B"]:
    """f32[B]: occupied slots per KV head, averaged over layers and heads."""
    per_layer = [
        sum(jnp.sum(s.pos >= 0, axis=(1, 2)) for s in layer.segments) / layer.segments[-1].pos.shape[1]
        for layer in cache.inlined().layers
    ]
    return jnp.sum(jnp.stack(per_layer), axis=0) / len(per_layer)  # whole where all layers keep as many
