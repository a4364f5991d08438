"""Slots as coordinates in bases, whatever their codec and layout."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int32

from kvjax import codecs
from kvjax.axes import rename
from kvjax.codecs import Stored
from kvjax.rope import Rope, rotate
from kvjax.segments.bases import Basis
from kvjax.segments.edits import Edit
from kvjax.segments.protocol import AnySegment, KeyRope, Queries, Ranks
from kvjax.segments.segment import Segment
from kvjax.slots import Slots
from pallas_kernels.attention_mass import Reduce
from pallas_kernels.decode_attention import Rotation
from pallas_kernels.encoded import cut
from pallas_kernels.logits import Scale, SoftCap
from pallas_kernels.partial import Partial


@struct.dataclass
class Expanded:
    """Keys `basis.expand(inner) + mean`, of which a tile at a time exists: read by attention, never stored."""

    inner: Stored  # coordinates
    basis: Basis

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return codecs.block_of(self.inner)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return jax.eval_shape(self.decode).shape

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        return expanded(codecs.decode(self.inner, dtype), self.basis)

    def cut(self, start, size) -> Expanded:
        """See `Encoded.cut`."""
        return self.replace(inner=cut(self.inner, start, size))


class LatentKeys(NamedTuple):
    """A `KeyBasis`: keys that are coordinates of un-rotated keys, expanded and rotated tile by tile."""

    basis: Basis | None

    def of(self, k: Stored, rope: Rope) -> tuple[Stored, Rotation]:
        """See `KeyBasis.of`."""
        if self.basis is None:
            return k, Rotation(rope.inv_freq)
        if self.basis.columns is not None:
            return k, Rotation(rope.inv_freq, basis=self.basis.columns, mean=self.basis.mean)
        return Expanded(k, self.basis), Rotation(rope.inv_freq)


def expanded(c: jax.Array, basis: Basis | None) -> jax.Array:
    """Returns vectors [B, K, n, H] of coordinates [B, K or 1, n, R], with the mean."""
    if basis is None:
        return c
    x = basis.expand(c)
    return x if basis.mean is None else x + basis.mean[..., None, :].astype(x.dtype)


@struct.dataclass
class LatentSegment:
    """Keys and values as coordinates in bases; the coordinates are a segment of any representation.

    Rotated keys (`key_rope="stored"`) are read in the reduced space: `<q, U c> = <U^T q, c>`, so queries are
    projected and keys never expanded. Keys from before the rotation ("at_attend") are expanded and rotated a
    tile at a time. Values are expanded after the weighted sum either way.

    Where the keys are the values (`Segment.v` is None) so are their coordinates, and one basis serves both.

    With `joint`, all KV heads share one coordinate vector a token, and the bases say how each head reads it; the
    coordinates of a token are then the sum over heads.

    Bytes: those of the coordinates and of the bases, which rows share unless they depend on the prompt.
    """

    latent: AnySegment  # [B, K, S, R], or [B, 1, S, R] when joint
    key_basis: Basis | None  # None: keys as they are
    value_basis: Basis | None  # None where the keys are the values, whose basis is that of the keys
    kv_heads: int = struct.field(pytree_node=False)
    key_rope: KeyRope = struct.field(pytree_node=False, default="stored")
    joint: bool = struct.field(pytree_node=False, default=False)
    own_values: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def of(
        cls, slots: Segment, key_basis: Basis | None, value_basis: Basis | None, *, joint: bool = False
    ) -> LatentSegment:
        """Projects dense slots, whose rotation (`key_rope`) stays as it is."""
        if slots.key_rope in ("rank", "window"):
            raise TypeError("LatentSegment takes slots with positions of their own: none that are re-indexed.")
        if joint and slots.bias is not None:
            raise TypeError("A joint LatentSegment cannot keep slots that each head has merged in its own way.")
        if value_basis is not None:
            slots.values_apart("A basis of the values")
        if key_basis is not None and key_basis.selects:
            slots.values_apart("A selection of key channels")
        like = cls(slots, key_basis, value_basis, slots.pos.shape[1], slots.key_rope, joint, slots.v is not None)
        return like.encode_like(slots)

    def encode_like(self, slots: Segment) -> LatentSegment:
        """Projects dense slots the way this segment is projected, and stores them as it does."""
        dense = slots.replace(
            k=self._coordinates(slots.k, self.key_basis),
            v=self._coordinates(slots.v, self.value_basis) if self.own_values else None,
            slots=Slots(slots.pos[:, :1] if self.joint else slots.pos, slots.bias),
            key_rope="stored",
        )
        return self.replace(latent=self.latent.encode_like(dense))

    def axes(self) -> LatentSegment:
        """See `AnySegment.axes`. Where coordinates depend on several heads, no head is alone on a shard."""
        bases = (self.key_basis, self.value_basis)
        named = self.replace(latent=self.latent and self.latent.axes())
        named = named.replace(**dict(zip(("key_basis", "value_basis"), (basis and basis.axes() for basis in bases))))
        if self.joint or any(basis is not None and basis.mixes_heads for basis in bases):
            return rename(named, {"kv_heads": None})
        return named

    @property
    def pos(self) -> Int32[Array, "B K S"]:
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
        key_basis: None = None,
    ) -> Partial:
        """See `AnySegment.attend`."""
        scale = queries.raw.shape[-1] ** -0.5 if scale is None else scale
        if self.key_rope == "stored":
            partial = self.latent.attend(self._projected(queries), window=window, scale=scale)
            partial = partial._replace(lse=partial.lse + self._mean_logit(queries, scale))
        else:
            key_basis = LatentKeys(self.key_basis)
            partial = self.latent.attend(queries, window=window, scale=scale, key_basis=key_basis)
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
        """See `AnySegment.mass`."""
        scale = queries.raw.shape[-1] ** -0.5 if scale is None else scale
        if self.key_rope == "stored":
            lse = lse - self._mean_logit(queries, scale)
            return self.latent.mass(self._projected(queries), lse, window=window, scale=scale, reduce=reduce)
        return self.dense().mass(queries, lse, window=window, scale=scale, reduce=reduce)

    def dense(self) -> Segment:
        """Keys and values expanded again, float32."""
        slots = self.latent.dense().astype(jnp.float32)
        return slots.replace(
            k=expanded(slots.k, self.key_basis),
            v=expanded(slots.v, self.value_basis) if self.own_values else None,
            slots=slots.slots.replace(pos=self.pos),
            key_rope=self.key_rope,
        )

    def map_dense(self, body, tail) -> LatentSegment:
        """See `AnySegment.map_dense`: what holds the coordinates."""
        return self.replace(latent=self.latent.map_dense(body, tail))

    def edited(self, edit: Edit) -> LatentSegment:
        """See `AnySegment.edited`: coordinates of rotated keys stay where they are."""
        if edit.rope is not None and self.key_rope == "stored" and self.key_basis is not None:
            raise ValueError("Coordinates of rotated keys cannot be moved: the basis is of keys where they were.")
        rope = edit.rope if self.key_rope == "stored" else None
        return self.replace(latent=self.latent.edited(edit._replace(rope=rope)))

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> LatentSegment:
        """See `AnySegment.append`. New tokens are projected at once."""
        if self.key_rope == "stored":
            k = rotate(k, pos[:, None], rope)
        k, v = self._coordinates(k, self.key_basis), self._coordinates(v, self.value_basis)
        return self.replace(latent=self.latent.append(k, v, pos, None))

    def reserve(self, tokens: int) -> LatentSegment:
        """See `AnySegment.reserve`."""
        return self.replace(latent=self.latent.reserve(tokens))

    def resize(self, slots: int) -> LatentSegment:
        """See `Segment.resize`."""
        return self.replace(latent=self.latent.resize(slots))

    def fields(self) -> LatentSegment:
        """See `Segment.fields`."""
        return jax.tree.map(lambda _: 0, self).replace(latent=self.latent.fields())

    def _coordinates(self, x: jax.Array, basis: Basis | None) -> jax.Array:
        if basis is None:
            return x
        if basis.mean is not None:
            x = x - basis.mean[..., None, :].astype(x.dtype)
        c = basis.coordinates(x)
        return jnp.sum(c, axis=1, keepdims=True) if self.joint else c

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
        mean = self.key_basis.mean.astype(jnp.float32)
        logit = scale * jnp.matmul(q, mean[..., None])[..., 0]
        return _by_token(logit[..., None], queries.pos.shape[1])[..., 0]

    def _expanded_output(self, partial: Partial) -> jax.Array:
        basis = self.value_basis if self.own_values else self.key_basis
        if basis is None:
            return partial.out
        T = partial.out.shape[1]
        out = basis.expand(_by_kv_head(partial.out, self._heads))
        if basis.mean is not None:
            out = out + basis.mean[..., None, :].astype(out.dtype)
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
