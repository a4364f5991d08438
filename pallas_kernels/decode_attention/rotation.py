"""Keys from before the rotation, and what becomes of them when they are read."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.rotary import rotate


class Rotation(NamedTuple):
    """Keys are `rotate(basis k + mean)`: what is stored are coordinates of keys from before the rotation."""

    inv_freq: jax.Array  # f32[H / 2], radians per token
    at: jax.Array | None = None  # i32[B, K or 1, S], what keys are rotated by; None: their tokens' positions
    basis: jax.Array | None = None  # [B or 1, K, H, R]; None: the stored are the keys themselves, R = H
    mean: jax.Array | None = None  # [K, H], or [B, K, H], added before the rotation

    def keys(self, k: jax.Array, at: jax.Array, gain: jax.Array | None = None) -> jax.Array:
        """Returns the rotated keys [B, K, s, H] of a tile.

        Args:
          k: [B, K or 1, s, R].
          at: i32[B, K or 1, s].
          gain: f32[B, K or 1, s] that k is multiplied by, for what adds a mean to the product. Optional.
        """
        if gain is not None:
            k = k * gain[..., None].astype(k.dtype)
        if self.basis is not None:
            k = jnp.matmul(k, self.basis.swapaxes(2, 3).astype(k.dtype))
        if self.mean is not None:
            k = k + self.mean[..., None, :].astype(k.dtype)
        return rotate(k, at, self.inv_freq)

    def of_owners(self, owner: jax.Array) -> Rotation:
        """Returns the rotation of pages, which have the basis and the mean of their owners i32[B, P]."""
        basis, mean = self.basis, self.mean
        if basis is not None:
            basis = jnp.take_along_axis(basis, owner[:, :, None, None], axis=1)
        return self._replace(basis=basis, mean=None if mean is None else mean[owner])
