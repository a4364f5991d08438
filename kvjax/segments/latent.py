"""Slots as coordinates in a basis: projections, low rank, selected channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kvjax.rope import Rope, rotate
from kvjax.segments.axes import P, rename
from kvjax.segments.dense import DenseSegment
from kvjax.segments.protocol import KeyRope, Queries, Ranks, Segment
from pallas_kernels.attention_mass import Reduce
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.logits import Scale, SoftCap
from pallas_kernels.partial import Partial


class Basis(Protocol):
    """A linear map between the H channels of a KV head and R coordinates."""

    mean: jax.Array | None  # [K, H], subtracted before and added after
    mixes_heads: bool  # coordinates of a head depend on other heads: only expanded vectors can be read

    def coordinates(self, x: jax.Array) -> jax.Array:
        """[B, K, n, H] -> [B, K, n, R], without the mean."""

    def expand(self, c: jax.Array) -> jax.Array:
        """[B, K or 1, n, R] -> [B, K, n, H], without the mean."""

    def coordinates_of_queries(self, q: jax.Array) -> jax.Array:
        """[B, K, n, H] -> [B, K, n, R], the transpose of `expand`: `<q, expand(c)> = <result, c>`."""

    def axes(self) -> Basis:
        """See `Segment.axes`."""


@struct.dataclass
class Matrix:
    """Coordinates `x @ matrix`, per KV head, expanded by the transpose of `inverse`.

    Without `inverse` that is the matrix itself, whose columns are orthonormal then.
    """

    matrix: jax.Array  # [1 or B, K, H, R]
    mean: jax.Array | None = None
    inverse: jax.Array | None = None  # [1 or B, K, H, R], of which `matrix^T inverse` is the identity
    mixes_heads = False

    def coordinates(self, x: jax.Array) -> jax.Array:
        """See `Basis.coordinates`."""
        return jnp.matmul(x, self.matrix.astype(x.dtype))

    def expand(self, c: jax.Array) -> jax.Array:
        """See `Basis.expand`."""
        return jnp.matmul(c, self.columns.swapaxes(2, 3).astype(c.dtype))

    def coordinates_of_queries(self, q: jax.Array) -> jax.Array:
        """See `Basis.coordinates_of_queries`."""
        return jnp.matmul(q, self.columns.astype(q.dtype))

    def axes(self) -> Matrix:
        """See `Segment.axes`."""
        of_heads = lambda x, names: None if x is None else names
        inverse = of_heads(self.inverse, P("batch", "kv_heads"))
        return Matrix(P("batch", "kv_heads"), of_heads(self.mean, P("kv_heads")), inverse)

    def cut(self, heads: Sequence[int], rank: int) -> Matrix:
        """The same for some of the KV heads, with the first `rank` coordinates."""
        heads = np.array(heads)
        return Matrix(
            self.matrix[:, heads, :, :rank],
            None if self.mean is None else self.mean[heads],
            None if self.inverse is None else self.inverse[:, heads, :, :rank],
        )

    @property
    def columns(self) -> jax.Array:
        """[1 or B, K, H, R], of which an expanded vector is the weighted sum."""
        return self.matrix if self.inverse is None else self.inverse


@struct.dataclass
class Channels:
    """Coordinates are some of the channels, each row's own."""

    index: jax.Array  # i32[B, K, R]
    channels: int = struct.field(pytree_node=False)  # [H]
    mean: jax.Array | None = None
    mixes_heads = False

    def coordinates(self, x: jax.Array) -> jax.Array:
        """See `Basis.coordinates`."""
        return jnp.take_along_axis(x, self.index[:, :, None], axis=-1)

    def axes(self) -> Channels:
        """See `Segment.axes`."""
        return self.replace(index=P("batch", "kv_heads"), mean=None if self.mean is None else P("kv_heads"))

    def expand(self, c: jax.Array) -> jax.Array:
        """See `Basis.expand`."""
        B, K, n, _ = c.shape
        put = jax.vmap(jax.vmap(lambda row, index: jnp.zeros((n, self.channels), c.dtype).at[:, index].set(row)))
        return put(c, self.index)

    coordinates_of_queries = coordinates


@struct.dataclass
class Scales:
    """Coordinates are the channels, each multiplied by a positive number: queries are divided by it."""

    factor: jax.Array  # f32[B, K, H]
    mean: jax.Array | None = None
    mixes_heads = False

    def coordinates(self, x: jax.Array) -> jax.Array:
        """See `Basis.coordinates`."""
        return (x * self.factor[:, :, None]).astype(x.dtype)

    def axes(self) -> Scales:
        """See `Segment.axes`."""
        return Scales(P("batch", "kv_heads"), None if self.mean is None else P("kv_heads"))

    def expand(self, c: jax.Array) -> jax.Array:
        """See `Basis.expand`."""
        return (c / self.factor[:, :, None]).astype(c.dtype)

    coordinates_of_queries = expand


@struct.dataclass
class LatentSegment:
    """Keys and values as coordinates in bases; the coordinates are a segment of any representation.

    Rotated keys (`key_rope="stored"`) are read in the reduced space: `<q, U c> = <U^T q, c>`, so queries are
    projected and keys never expanded. Keys from before the rotation ("at_attend") are expanded and rotated a
    tile at a time. Values are expanded after the weighted sum either way.

    Where the keys are the values (`DenseSegment.v` is None) so are their coordinates, and one basis serves both.

    With `joint`, all KV heads share one coordinate vector a token, and the bases say how each head reads it; the
    coordinates of a token are then the sum over heads.

    Bytes: those of the coordinates and of the bases, which rows share unless they depend on the prompt.
    """

    latent: Segment  # [B, K, S, R], or [B, 1, S, R] when joint
    key_basis: Basis | None  # None: keys as they are
    value_basis: Basis | None  # None where the keys are the values, whose basis is that of the keys
    kv_heads: int = struct.field(pytree_node=False)
    key_rope: KeyRope = struct.field(pytree_node=False, default="stored")
    joint: bool = struct.field(pytree_node=False, default=False)
    own_values: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def of(
        cls, slots: DenseSegment, key_basis: Basis | None, value_basis: Basis | None, *, joint: bool = False
    ) -> LatentSegment:
        """Projects dense slots, whose rotation (`key_rope`) stays as it is."""
        if slots.ring_sinks is not None or slots.key_rope == "rank":
            raise TypeError("LatentSegment takes plain slots: no rings, no re-indexed positions.")
        if joint and slots.bias is not None:
            raise TypeError("A joint LatentSegment cannot keep slots that each head has merged in its own way.")
        if value_basis is not None:
            slots.values_apart("A basis of the values")
        if isinstance(key_basis, Channels):
            slots.values_apart("A selection of key channels")
        like = cls(slots, key_basis, value_basis, slots.pos.shape[1], slots.key_rope, joint, slots.v is not None)
        return like.encode_like(slots)

    def encode_like(self, slots: DenseSegment) -> LatentSegment:
        """Projects dense slots the way this segment is projected; what holds the coordinates is dense."""
        dense = slots.replace(
            k=self._coordinates(slots.k, self.key_basis),
            v=self._coordinates(slots.v, self.value_basis) if self.own_values else None,
            pos=slots.pos[:, :1] if self.joint else slots.pos,
            key_rope="stored",
            stats={},
        )
        encode = getattr(self.latent, "encode_like", lambda x: x)
        return self.replace(latent=encode(dense))

    def axes(self) -> LatentSegment:
        """See `Segment.axes`. Where coordinates depend on several heads, no head is alone on a shard."""
        bases = (self.key_basis, self.value_basis)
        named = self.replace(latent=self.latent and self.latent.axes())
        named = named.replace(**dict(zip(("key_basis", "value_basis"), (basis and basis.axes() for basis in bases))))
        if self.joint or any(basis is not None and basis.mixes_heads for basis in bases):
            return rename(named, {"kv_heads": None})
        return named

    @property
    def pos(self) -> jax.Array:
        """i32[B, K, S]."""
        pos = self.latent.pos
        return jnp.broadcast_to(pos, (pos.shape[0], self._heads, pos.shape[2]))

    @property
    def _heads(self) -> int:
        """KV heads that are here: on a mesh, those of the shard."""
        return self.kv_heads if self.joint else self.latent.pos.shape[1]

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None = None,
        scale: float | None = None,
        ranks: Ranks | None = None,
    ) -> Partial:
        """See `Segment.attend`."""
        scale = queries.raw.shape[-1] ** -0.5 if scale is None else scale
        if self.key_rope == "stored":
            partial = self.latent.attend(self._projected(queries), window=window, scale=scale)
            partial = partial._replace(lse=partial.lse + self._mean_logit(queries, scale))
        elif isinstance(self.latent, DenseSegment) and isinstance(self.key_basis, Matrix):
            columns, mean = self.key_basis.columns, self.key_basis.mean
            partial = self.latent.attend_expanded(queries, columns, mean, window=window, scale=scale)
        else:
            partial = self.latent.fold_dense(
                lambda tile: self._attend_tile(queries, tile, window=window, scale=scale)
            )
        return partial._replace(out=self._expanded_output(partial))

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
        scale = queries.raw.shape[-1] ** -0.5 if scale is None else scale
        if self.key_rope == "stored":
            lse = lse - self._mean_logit(queries, scale)
            return self.latent.mass(self._projected(queries), lse, window=window, scale=scale, reduce=reduce)
        return self.dense().mass(queries, lse, window=window, scale=scale, reduce=reduce)

    def dense(self) -> DenseSegment:
        """Keys and values expanded again, float32."""
        slots = self.latent.dense().astype(jnp.float32)
        return slots.replace(
            k=self._expanded(slots.k, self.key_basis),
            v=self._expanded(slots.v, self.value_basis) if self.own_values else None,
            pos=self.pos,
            key_rope=self.key_rope,
        )

    def map_dense(self, body, tail) -> LatentSegment:
        """See `Segment.map_dense`: what holds the coordinates."""
        return self.replace(latent=self.latent.map_dense(body, tail))

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> LatentSegment:
        """See `Segment.append`. New tokens are projected at once."""
        if self.key_rope == "stored":
            k = rotate(k, pos[:, None], rope)
        k, v = self._coordinates(k, self.key_basis), self._coordinates(v, self.value_basis)
        return self.replace(latent=self.latent.append(k, v, pos, None))

    def reserve(self, tokens: int) -> LatentSegment:
        """See `Segment.reserve`."""
        return self.replace(latent=self.latent.reserve(tokens))

    def _coordinates(self, x: jax.Array, basis: Basis | None) -> jax.Array:
        if basis is None:
            return x
        if basis.mean is not None:
            x = x - basis.mean[:, None].astype(x.dtype)
        c = basis.coordinates(x)
        return jnp.sum(c, axis=1, keepdims=True) if self.joint else c

    def _expanded(self, c: jax.Array, basis: Basis | None) -> jax.Array:
        if basis is None:
            return c
        x = basis.expand(c)
        return x if basis.mean is None else x + basis.mean[:, None].astype(x.dtype)

    def _projected(self, queries: Queries) -> Queries:
        if self.key_basis is None:
            return Queries(queries.rotated, queries.pos, None)
        q = _by_kv_head(queries.rotated, self._heads)
        return Queries(_by_token(self.key_basis.coordinates_of_queries(q), queries.pos.shape[1]), queries.pos, None)

    def _mean_logit(self, queries: Queries, scale: Scale) -> jax.Array:
        """f32[B, T, N]: what the mean key adds to every logit of a query."""
        if self.key_basis is None or self.key_basis.mean is None:
            return jnp.zeros((), jnp.float32)
        if isinstance(scale, SoftCap):
            raise TypeError("Where logits are capped, keys cannot be read in a basis around their mean: leave it out.")
        q = _by_kv_head(queries.rotated.astype(jnp.float32), self._heads)
        logit = scale * jnp.einsum("bkrh,kh->bkr", q, self.key_basis.mean.astype(jnp.float32))
        return _by_token(logit[..., None], queries.pos.shape[1])[..., 0]

    def _attend_tile(self, queries: Queries, tile: DenseSegment, **how) -> Partial:
        pos = jnp.broadcast_to(tile.pos, (tile.pos.shape[0], self._heads, tile.pos.shape[2]))
        tile = tile.astype(queries.raw.dtype)  # 8-bit floats are for storage only
        k = rotate(self._expanded(tile.k, self.key_basis), pos, queries.rope)
        v = jnp.broadcast_to(tile.values, (*pos.shape, tile.values.shape[-1]))
        return decode_attention(queries.rotated, k, v, queries.pos, pos, bias=tile.bias, **how)

    def _expanded_output(self, partial: Partial) -> jax.Array:
        basis = self.value_basis if self.own_values else self.key_basis
        if basis is None:
            return partial.out
        T = partial.out.shape[1]
        out = basis.expand(_by_kv_head(partial.out, self._heads))
        if basis.mean is not None:
            out = out + basis.mean[:, None].astype(out.dtype)
        out = _by_token(out, T)
        return jnp.where((partial.lse == -jnp.inf)[..., None], 0.0, out)


def _by_kv_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, n] -> [B, K, T * G, n]."""
    B, T, N, n = x.shape
    return x.reshape(B, T, kv_heads, N // kv_heads, n).swapaxes(1, 2).reshape(B, kv_heads, -1, n)


def _by_token(x: jax.Array, tokens: int) -> jax.Array:
    """[B, K, T * G, n] -> [B, T, N, n]."""
    B, K, _, n = x.shape
    return x.reshape(B, K, tokens, -1, n).swapaxes(1, 2).reshape(B, tokens, -1, n)
