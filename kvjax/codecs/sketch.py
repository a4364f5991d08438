"""Signs of a random projection, with norms: inner products without bias, from one bit a coordinate."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, UInt8

from kvjax.axes import OF_SLOTS, cut_slots
from pallas_kernels.words import WORD_BITS, pack, unpack


@struct.dataclass
class SignSketch:
    """`x ~ sqrt(pi / 2) / m * |x| * S sign(S^T x)`, S of m random directions in H channels, orthogonal H by H.

    With any q the inner product has the mean of `<x, q>` over S. Of every `group` tokens the `outliers` channels of
    largest norm are taken out and sketched by themselves, with as many signs as channels.

    Bytes, with norms of e bytes: `B * K * S * ((m + H) / 8 + 2 * e + outliers / group)`; without outliers
    `B * K * S * (m / 8 + e)`.

    Source: Zandieh, Daliri, Han, QJL (2024), arXiv:2406.03482, algorithm 1.
    """

    signs: tuple[jax.Array, ...] | None  # u32[B, K, S / 32, m], and of the outliers u32[B, K, S / 32, H]
    norms: tuple[jax.Array, ...] | None  # [B, K, S] each
    index: UInt8[Array, "B K S/group outliers"] | None  # channels
    width: float = struct.field(pytree_node=False)  # m / H
    outliers: int = struct.field(pytree_node=False, default=8)
    group: int = struct.field(pytree_node=False, default=32)
    seed: int = struct.field(pytree_node=False, default=0)
    channels: int = struct.field(pytree_node=False, default=0)  # [H]; 0 without slots
    dtype: str = struct.field(pytree_node=False, default="bfloat16")  # of norms

    by_slot = False

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return math.lcm(self.group, WORD_BITS)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return *self.norms[0].shape, self.channels

    def for_slots(self, slots: int, block: int | None = None) -> SignSketch:
        """See `Encoded.for_slots`."""
        return self

    def like(self, x: jax.Array, occupied: jax.Array) -> SignSketch:
        """See `Encoded.like`.

        Raises:
          ValueError: there are fewer channels than outliers, or more than a byte names.
        """
        B, K, S, H = x.shape
        if not self.outliers < H <= 256:
            raise ValueError(f"outliers must be below the channels of a head, of at most 256: {self.outliers} and {H}.")
        x = jnp.where(occupied[..., None], x.astype(jnp.float32), 0.0)
        parts, index = [x], None
        if self.outliers:
            power = jnp.sum(jnp.square(x.reshape(B, K, S // self.group, self.group, H)), axis=3)
            index = jax.lax.top_k(power, self.outliers)[1]
            out = jnp.repeat(jnp.any(index[..., None] == jnp.arange(H), axis=-2), self.group, axis=2)
            parts = [jnp.where(out, 0.0, x), jnp.where(out, x, 0.0)]
            index = index.astype(jnp.uint8)
        like = self.replace(channels=H)
        signs = [pack((jnp.matmul(y, s) > 0).astype(jnp.uint32), 1) for y, s in zip(parts, like._directions)]
        norms = [jnp.sqrt(jnp.sum(jnp.square(y), axis=-1)).astype(self.dtype) for y in parts]
        return like.replace(signs=tuple(signs), norms=tuple(norms), index=index)

    @property
    def _directions(self) -> tuple[np.ndarray, ...]:
        """f32[H, m] of the sketches; the outliers have H."""
        count = max(1, round(self.width * self.channels))
        found = _orthogonal(self.channels, count + self.channels, self.seed)
        return (found[:, :count], found[:, count:]) if self.outliers else (found[:, :count],)

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        x = 0.0
        for words, norm, directions in zip(self.signs, self.norms, self._directions):
            sign = 2 * unpack(words, 1).astype(jnp.float32) - 1
            size = math.sqrt(math.pi / 2) / directions.shape[1] * norm.astype(jnp.float32)
            x = x + size[..., None] * jnp.matmul(sign, directions.T)
        return x.astype(dtype)

    def cut(self, start, size) -> SignSketch:
        """See `Encoded.cut`."""
        return cut_slots(self, self.axes(), self.shape[2], start, size, self.block)

    def axes(self) -> SignSketch:
        """See `Encoded.axes`."""
        return jax.tree.map(lambda _: OF_SLOTS, self)

    def fields(self) -> SignSketch:
        """See `Encoded.fields`."""
        zeros = jax.tree.map(lambda _: 0, self)
        return zeros.replace(signs=tuple(1 for _ in self.signs))

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self, None


@functools.cache
def _orthogonal(channels: int, count: int, seed: int) -> np.ndarray:
    """f32[H, count]: random rotations side by side, each column of length sqrt(H)."""
    rng, blocks = np.random.default_rng(seed), -(-count // channels)
    turns = [np.linalg.qr(rng.normal(size=(channels, channels)))[0] for _ in range(blocks)]
    return np.float32(np.concatenate(turns, axis=1)[:, :count] * channels**0.5)
