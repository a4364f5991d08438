"""The rotation of a rotary embedding, for whatever stores keys from before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_SHARED_TABLE = 1 << 12  # numbers from which a table of cosines is worth its memory


def rotate(x: jax.Array, pos: jax.Array, inv_freq: jax.Array) -> jax.Array:
    """Rotates each pair `(x[i], x[i + H/2])` by `pos * inv_freq[i]`.

    Args:
      x: [..., H].
      pos: i32, broadcastable to x.shape[:-1]; token positions, or any other index.
      inv_freq: f32[H / 2], radians per token.

    Returns:
      [..., H] in x's dtype, computed in float32.

    Source: Su et al., RoFormer (2021), section 3.4.2.
    """
    angle = pos[..., None].astype(jnp.float32) * inv_freq
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    if _SHARED_TABLE < cos.size < x.size:
        # Fused into the product, every head would compute the same cosines again: half of the time.
        cos, sin = jax.lax.optimization_barrier((cos, sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (x * cos + jnp.concatenate([b, a], axis=-1) * sin).astype(x.dtype)
