"""Rotary positions: one rotation, used by the decoder, by segments and by everything that re-indexes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32

from pallas_kernels import rotary


@struct.dataclass
class Rope:
    """The angular frequencies of a rotary embedding: `angle(pos, i) = pos * inv_freq[i]`."""

    inv_freq: Float32[Array, " H/2"]  # radians per token

    @classmethod
    def from_base(cls, base: float, head_dim: int) -> Rope:
        """`inv_freq[i] = base ** (-2 i / H)`. Source: Su et al., RoFormer (2021), section 3.2."""
        exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        return cls(inv_freq=base**-exponent)


def rotate(x: Float[Array, "... H"], pos: jax.Array, rope: Rope | None) -> Float[Array, "... H"]:
    """Rotates each pair `(x[i], x[i + H/2])` by `pos * inv_freq[i]`.

    Args:
      x: [..., H].
      pos: i32, broadcastable to x.shape[:-1]; token positions, or any other index.
      rope: the frequencies; None leaves x as it is.

    Returns:
      [..., H] in x's dtype, computed in float32.
    """
    if rope is None:
        return x
    return rotary.rotate(x, pos, rope.inv_freq)


def re_rotate(x: Float[Array, "... H"], delta: jax.Array, rope: Rope) -> Float[Array, "... H"]:
    """Moves rotated keys by `delta` tokens: `R(delta) R(pos) k = R(pos + delta) k`.

    Args:
      x: [..., H], already rotated.
      delta: i32, broadcastable to x.shape[:-1]; new position minus old.
      rope: the frequencies.

    Returns:
      [..., H] in x's dtype.
    """
    return rotate(x, delta, rope)
