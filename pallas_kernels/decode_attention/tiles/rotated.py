"""Reads keys from before the rotation: coordinates are expanded and rotated in VMEM.

Keys are expanded with slots along lanes, where positions lie, and channels along sublanes, where the two halves of a
rotation are parted without moving anything.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.rotation import Rotation
from pallas_kernels.decode_attention.tiles import dense
from pallas_kernels.decode_attention.tiles.dense import as_laid_out, widened
from pallas_kernels.encoded import Encoded, is_encoded
from pallas_kernels.tpu_decode import Cost, Keys, Stored, number_per_slot, product
from pallas_kernels.tpu_rotation import cosine_and_sine, turns_per_token
from pallas_kernels.tpu_tiles import SUBLANES

_EXPANDED = 3  # float32 arrays [H, s] of a head: keys, rotated keys, cosines and sines; the rest is in registers


def rotated_keys(k: jax.Array, q: jax.Array, rotation: Rotation, k_gain: jax.Array | None = None) -> Keys:
    """Keys `rotate(basis (k_gain c) + mean)` of coordinates c, or of keys without a basis."""
    inv_freq, at, basis, mean = rotation
    stored, half, dtype = as_laid_out(k), len(inv_freq), q.dtype

    def logits(q, pos, tile, turns, *rest):
        basis, mean, at, gain = _given_back(given, rest)
        x = expanded(tile, basis)
        if gain is not None:
            x *= gain
        if mean is not None:
            x += mean
        cos, sin = cosine_and_sine(pos if at is None else at, turns, dtype)  # [H / 2, s]
        a, b = x[:half], x[half:]
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=0)
        return product(q.astype(dtype), rotated.astype(dtype))

    def expanded(tile, basis):
        """f32[H, s]."""
        by_slot = (1, 1 if stored.axis == 2 else 0)
        if basis is not None:
            return product(basis, widened(tile, dtype).astype(dtype), by_slot)
        if stored.axis == 3:
            return tile.astype(jnp.float32)
        if tile.dtype != jnp.bfloat16:
            return tile.astype(jnp.float32).T
        # Transposed by the matrix unit, which has nothing else to do.
        shape = tile.shape[1], tile.shape[1]
        same = jax.lax.broadcasted_iota(jnp.int32, shape, 0) == jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return product(same.astype(jnp.float32).astype(tile.dtype), tile, by_slot)

    given = (
        None if basis is None else Stored(basis.astype(dtype), None),
        None if mean is None else Stored(mean.astype(jnp.float32)[None, ..., None], None),
        None if at is None else number_per_slot(at),
        None if k_gain is None else number_per_slot(k_gain.astype(jnp.float32)),
    )
    of_all = Stored(turns_per_token(inv_freq)[None, None, :, None], None)
    return Keys((stored, of_all, *(x for x in given if x is not None)), logits)


def _given_back(places, values):
    """The values one after the other, at the places that are not None."""
    values = iter(values)
    return [None if place is None else next(values) for place in places]


def cost(k: jax.Array, q: jax.Array, kv_heads: int, rotation: Rotation) -> Cost:
    """See `Loader`."""
    read = dense.cost(k, q, kv_heads)
    given = {name: int(getattr(rotation, name) is not None) for name in ("basis", "at")}
    return Cost(
        read.stored + 4 * given["at"], read.expanded + _EXPANDED * q.shape[3] * 4, key=(*read.key, *given.items())
    )


def unsupported(k: jax.Array | Encoded, q: jax.Array, pages: bool, rotation: Rotation) -> str | None:
    """Returns why keys cannot be rotated when they are read, or None."""
    if is_encoded(k):
        return f"rotates no keys of {type(k).__name__}"
    if pages and (rotation.basis is not None or rotation.mean is not None):
        return "has no bases and means for pages"
    H = q.shape[3]
    return f"takes heads of a multiple of {2 * SUBLANES} channels, got {H}" if H % (2 * SUBLANES) else None
