"""Indices of pages: what is remembered of a page to tell, for a query, how much its tokens may matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int32

from kvjax.axes import OF_SLOTS, OF_SLOTS_LAST, P
from kvjax.segments.protocol import Queries
from kvjax.segments.slots import without_rounding

__all__ = ["Bounds", "Exact", "Index", "Labels", "MeanKey", "StrongChannels"]

Agree = Literal["max", "sum", "softmax_max", "softmax_mean"]
"""How the G query heads of a KV head agree on one choice: by the maximum or the sum of their scores, or of the softmax
of these over all pages, which makes heads comparable."""

Keys = Callable[[], jax.Array]
"""Decodes all stored keys, [B, K, S, H], rotated."""


class Chosen(NamedTuple):
    """Pages that queries read; `pages` None: all of them. Layers hand it on."""

    pages: Int32[Array, "B K T n"] | None = None
    valid: Bool[Array, "B K T n"] | None = None

    def specs(self, batch, heads) -> Chosen:
        """The axes of the mesh that each array is split over: all shards know all choices of their heads."""
        return jax.tree.map(lambda _: P(batch, heads), self)


class Index(Protocol):
    """Summarises pages and scores them for a query; a frozen pytree, equal to others of the same numbers.

    A score says in which order pages are read, no more.
    """

    reads_keys: bool
    """Whether a score needs all keys, as `Exact` does."""

    def summarise(
        self, keys: Float[Array, "B K P page H"], raw: jax.Array, occupied: Bool[Array, "B K P page 1"]
    ) -> Any:
        """Returns what is remembered of pages: a tree of [B, K, P, ...], finite also where nothing is.

        Args:
          keys: [B, K, P, page, H], rotated.
          raw: the same as they are stored, un-rotated where `key_rope` says so.
          occupied: bool[B, K, P, page, 1].
        """

    def score(self, summary: Any, queries: Queries, keys: Keys, there: jax.Array) -> Float32[Array, "B T K P"]:
        """f32[B, T, K, P] for T queries, of pages that bool[B, T, K, P] says are there."""

    def summary_axes(self, summary: Any) -> Any:
        """The names of the axes of a summary, see `AnySegment.axes`."""

    def axes(self) -> Index:
        """The same for its own arrays."""

    def bytes_read(self, summary: Any, key_bytes: int) -> int:
        """Returns the bytes that scoring for one query reads, of a summary (or its shapes) and of the stored keys."""


@struct.dataclass
class _OfPages:
    """What most indices have in common: all of a summary is read, and lies page by page."""

    reads_keys = False

    agree: Agree = struct.field(pytree_node=False, default="max")

    def summary_axes(self, summary: Any) -> Any:
        """See `Index.summary_axes`."""
        return jax.tree.map(lambda _: OF_SLOTS, summary)

    def axes(self) -> Index:
        """See `Index.axes`: nothing of its own."""
        return self

    def bytes_read(self, summary: Any, key_bytes: int) -> int:
        """See `Index.bytes_read`."""
        return bytes_of(summary)


@struct.dataclass
class Bounds(_OfPages):
    """Scores a page by the most that a key inside its bounds can give: `sum_d max(q_d M_d, q_d m_d)`.

    With `blend` it is `sum_d q_d (blend M_d + (1 - blend) m_d)`, which compares nothing.
    """

    blend: float | None = struct.field(pytree_node=False, default=None)

    def summarise(self, keys, raw, occupied):
        """See `Index.summarise`: [B, K, P, 2 H], the largest and the smallest number of every channel."""
        highest = jnp.max(jnp.where(occupied, keys, -jnp.inf), axis=3)
        lowest = jnp.min(jnp.where(occupied, keys, jnp.inf), axis=3)
        both = jnp.concatenate([highest, lowest], axis=-1)
        return jnp.where(jnp.isfinite(both), both, 0).astype(keys.dtype)

    def score(self, summary, queries, keys, there):
        """See `Index.score`."""
        q = by_kv_head(queries.rotated, summary.shape[1]).astype(jnp.float32)
        parts = (jnp.maximum(q, 0), jnp.minimum(q, 0)) if self.blend is None else (self.blend * q, (1 - self.blend) * q)
        return agreed(_dots(jnp.concatenate(parts, axis=-1), summary), there, self.agree)


@struct.dataclass
class MeanKey(_OfPages):
    """Scores a page by the product of the query and its mean key; with `raw`, of both before their rotation.

    With `all_heads` the KV heads of a layer share one choice: scores are summed over them. The `outliers` pages that
    their mean tells least of, by the lowest cosine of a key with it, come before all others.
    """

    raw: bool = struct.field(pytree_node=False, default=False)
    all_heads: bool = struct.field(pytree_node=False, default=False)
    outliers: int = struct.field(pytree_node=False, default=0)

    def summarise(self, keys, raw, occupied):
        """See `Index.summarise`: [B, K, P, H], and f32[B, K, P], the lowest cosine, where there are outliers."""
        x = (raw if self.raw else keys).astype(jnp.float32)
        mean = jnp.sum(jnp.where(occupied, x, 0), axis=3) / jnp.maximum(jnp.sum(occupied, axis=3), 1)
        if not self.outliers:
            return mean.astype(keys.dtype)
        size = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1))
        dots = jnp.sum(x * mean[:, :, :, None], axis=-1)
        cosine = dots / jnp.maximum(size(x) * size(mean)[..., None], jnp.finfo(jnp.float32).tiny)
        return mean.astype(keys.dtype), jnp.min(jnp.where(occupied[..., 0], cosine, 1), axis=-1)

    def score(self, summary, queries, keys, there):
        """See `Index.score`."""
        summary, cosine = summary if self.outliers else (summary, None)
        q = by_kv_head(queries.raw if self.raw else queries.rotated, summary.shape[1]).astype(jnp.float32)
        score = agreed(_dots(q, summary) * q.shape[-1] ** -0.5, there, self.agree)
        if cosine is not None:
            odd = jnp.where(there, -without_rounding(cosine)[:, None], -jnp.inf)
            nth = jax.lax.top_k(odd, min(self.outliers, odd.shape[-1]))[0][..., -1:]
            score = jnp.where(odd >= nth, jnp.inf, score)
        return jnp.broadcast_to(jnp.sum(score, axis=2, keepdims=True), score.shape) if self.all_heads else score


@struct.dataclass
class Labels(_OfPages):
    """Scores a page by the dot product over few channels of each KV head, those of its token that gives most.

    Meant for pages of one token.
    """

    channels: Int32[Array, "K r"] | None = None

    def summarise(self, keys, raw, occupied):
        """See `Index.summarise`: [B, K, P, page, r]."""
        of_heads = self.channels[None, :, None, None]
        return jnp.where(occupied, jnp.take_along_axis(keys, of_heads, axis=-1), 0)

    def score(self, summary, queries, keys, there):
        """See `Index.score`."""
        B, K, pages, page, r = summary.shape
        q = by_kv_head(queries.rotated, K).astype(jnp.float32)
        q = jnp.take_along_axis(q, self.channels[None, :, None, None], axis=-1)
        dots = _dots(q, summary.reshape(B, K, pages * page, r)) * r**-0.5
        return agreed(jnp.max(dots.reshape(*dots.shape[:-1], pages, page), axis=-1), there, self.agree)

    def axes(self) -> Labels:
        """See `Index.axes`."""
        return self.replace(channels=P("kv_heads"))


@struct.dataclass
class Exact(_OfPages):
    """Scores a page by its token that gives most: every key is read, which is the best that an index can do."""

    reads_keys = True

    def summarise(self, keys, raw, occupied):
        """See `Index.summarise`: nothing."""
        return ()

    def score(self, summary, queries, keys, there):
        """See `Index.score`."""
        k, pages = keys(), there.shape[-1]
        dots = _dots(by_kv_head(queries.rotated, k.shape[1]).astype(jnp.float32), k) * k.shape[-1] ** -0.5
        return agreed(jnp.max(dots.reshape(*dots.shape[:-1], pages, -1), axis=-1), there, self.agree)

    def bytes_read(self, summary: Any, key_bytes: int) -> int:
        """See `Index.bytes_read`."""
        return key_bytes


@struct.dataclass
class StrongChannels(_OfPages):
    """Scores by the query's r strongest channels, `softmax(q_r k_r / tau)`: keys a second time, channel by channel.

    `tau = sqrt(H * |q_r|_1 / |q|_1)`, as SparQ has it. The G heads of a KV head choose channels together, by the sum of
    `|q|`, so that one row of keys is read for all.
    """

    r: int = struct.field(pytree_node=False, default=32)

    def summarise(self, keys, raw, occupied):
        """See `Index.summarise`: [B, K, H, P * page]."""
        B, K, pages, page, H = keys.shape
        return jnp.where(occupied, keys, 0).reshape(B, K, pages * page, H).swapaxes(2, 3)

    def score(self, summary, queries, keys, there):
        """See `Index.score`."""
        B, K, H, S = summary.shape
        q = by_kv_head(queries.rotated, K).astype(jnp.float32)  # [B, K, T, G, H]
        size = jnp.sum(jnp.abs(q), axis=3)
        _, index = jax.lax.top_k(size, self.r)  # [B, K, T, r]
        strong = jnp.take_along_axis(q, index[:, :, :, None], axis=-1)
        rows = jax.vmap(jax.vmap(lambda x, i: x[i]))(summary, index)  # [B, K, T, r, S]
        whole = jnp.maximum(jnp.sum(jnp.abs(q), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        tau = jnp.sqrt(H * jnp.sum(jnp.abs(strong), axis=-1, keepdims=True) / whole)
        dots = jnp.einsum("bktgr,bktrs->bktgs", strong, rows.astype(jnp.float32), precision="highest")
        dots = (dots / jnp.maximum(tau, jnp.finfo(jnp.float32).tiny)).transpose(0, 2, 1, 3, 4)
        pages = there.shape[-1]
        return agreed(jnp.max(dots.reshape(*dots.shape[:-1], pages, -1), axis=-1), there, self.agree)

    def summary_axes(self, summary: Any) -> Any:
        """See `Index.summary_axes`."""
        return OF_SLOTS_LAST

    def bytes_read(self, summary: Any, key_bytes: int) -> int:
        """See `Index.bytes_read`: r of H channels."""
        return bytes_of(summary) * self.r // summary.shape[2]


def bytes_of(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of their shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def by_kv_head(x: jax.Array, kv_heads: int) -> Float[Array, "B K T G H"]:
    """[B, T, N, H] -> [B, K, T, G, H]."""
    B, T, N, H = x.shape
    return x.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 1, 3, 4)


def _dots(q: jax.Array, k: jax.Array) -> jax.Array:
    """f32[B, T, K, G, S] of [B, K, T, G, H] and [B, K, S, H]."""
    dots = jnp.einsum("bktgh,bksh->bktgs", q, k.astype(jnp.float32), precision="highest")
    return dots.transpose(0, 2, 1, 3, 4)


def agreed(scores: jax.Array, there: jax.Array, agree: Agree) -> Float32[Array, "B T K P"]:
    """f32[B, T, K, P] of the scores [B, T, K, G, P] of every query head: see `Agree`."""
    if agree.startswith("softmax"):
        scores = jax.nn.softmax(jnp.where(there[:, :, :, None], scores, -1e30), axis=-1)
    reduce = {"max": jnp.max, "softmax_max": jnp.max, "sum": jnp.sum, "softmax_mean": jnp.mean}[agree]
    return reduce(scores, axis=3)
