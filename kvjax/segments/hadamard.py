"""A basis of Walsh-Hadamard vectors: spreads what is large in one channel over all of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float32, Int32

from kvjax.axes import P


@functools.cache
def hadamard(n: int) -> np.ndarray:
    """f32[n, n]: the symmetric orthogonal matrix `(-1) ** popcount(i & j) / sqrt(n)`, its own inverse.

    Raises:
      ValueError: n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Walsh-Hadamard rotation needs a power of two, got {n}.")
    signs = np.ones((1, 1))
    while len(signs) < n:
        signs = np.block([[signs, signs], [signs, -signs]])
    return (signs / np.sqrt(n)).astype(np.float32)


@functools.cache
def random_signs(n: int, seed: int) -> np.ndarray:
    """f32[n]: +1 or -1, each as likely."""
    return np.random.default_rng(seed).choice(np.float32([-1, 1]), n)


@struct.dataclass
class Hadamard:
    """Coordinates of groups of `heads` KV heads in Hadamard vectors of their `heads * H` channels, then reordered.

    With a `seed`, the signs of the channels are turned at random first: no vector that is not made for it is large in
    one coordinate.

    With `heads > 1` or an order, coordinates of a head depend on others, so all must hold the same tokens, and only
    expanded vectors can be read (`key_rope="at_attend"`).

    Bytes: `8 * K * H` with an order, else none: the matrix is a constant of the program.
    """

    order: Int32[Array, " K*H"] | None = None  # which rotated channel each coordinate is
    back: Int32[Array, " K*H"] | None = None  # its inverse
    heads: int = struct.field(pytree_node=False, default=1)
    seed: int | None = struct.field(pytree_node=False, default=None)  # of the signs; None: all are +1
    mean = columns = None
    selects = False

    @classmethod
    def sorted_by(cls, mean: Float32[Array, "K H"], heads: int) -> Hadamard:
        """Orders the coordinates by their mean, lowest first.

        Args:
          mean: f32[K, H], of the vectors to store.
          heads: KV heads that are mixed; divides K.
        """
        K, H = mean.shape
        if heads < 1 or K % heads:
            raise ValueError(f"heads must divide the {K} KV heads, got {heads}.")
        rotated = cls(heads=heads).coordinates(jnp.asarray(mean, jnp.float32)[None, :, None])
        order = np.argsort(np.asarray(rotated).ravel(), kind="stable")
        return cls(jnp.int32(order), jnp.int32(np.argsort(order)), heads)

    def axes(self) -> Hadamard:
        """See `AnySegment.axes`."""
        return jax.tree.map(lambda _: P(), self)

    @property
    def mixes_heads(self) -> bool:
        """See `Basis.mixes_heads`."""
        return self.heads > 1 or self.order is not None

    def coordinates(self, x: jax.Array) -> jax.Array:
        """See `Basis.coordinates`."""
        return _reorder(self._rotate(self._signed(x)), self.order)

    coordinates_of_queries = coordinates  # the matrix is orthogonal

    def expand(self, c: jax.Array) -> jax.Array:
        """See `Basis.expand`."""
        return self._signed(self._rotate(_reorder(c, self.back)))

    def _signed(self, x: jax.Array) -> jax.Array:
        return x if self.seed is None else x * jnp.asarray(random_signs(x.shape[-1], self.seed), x.dtype)

    def _rotate(self, x: jax.Array) -> jax.Array:
        B, K, n, H = x.shape
        x = jnp.matmul(x, jnp.asarray(hadamard(H), x.dtype))
        if self.heads == 1:
            return x
        groups = x.reshape(B, K // self.heads, self.heads, n, H)
        mixed = jnp.einsum("bagnh,gi->bainh", groups, jnp.asarray(hadamard(self.heads), x.dtype))
        return mixed.reshape(B, K, n, H)


def _reorder(x: jax.Array, order: jax.Array | None) -> jax.Array:
    """[B, K, n, H] with the K * H channels of a token in another order."""
    if order is None:
        return x
    B, K, n, H = x.shape
    flat = jnp.take(x.swapaxes(1, 2).reshape(B, n, K * H), order, axis=-1)
    return flat.reshape(B, n, K, H).swapaxes(1, 2)
