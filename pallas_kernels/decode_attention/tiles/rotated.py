"""Reads keys from before the rotation: coordinates are expanded and rotated in VMEM.

Keys are expanded with slots along lanes, where positions lie, and channels along sublanes, where the two halves of a
rotation are parted without moving anything.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.rotation import Rotation
from pallas_kernels.encoded import Encoded, is_encoded
from pallas_kernels.levels import Levels
from pallas_kernels.quantize_pack import Packed
from pallas_kernels.tpu_decode import Cost, Keys, Numbers, Stored, number_per_slot, product, transposed
from pallas_kernels.tpu_rotation import cosine_and_sine, turns_per_token
from pallas_kernels.tpu_tiles import SUBLANES

_EXPANDED = 3  # float32 arrays [H, s] of a head: keys, rotated keys, cosines and sines; the rest is in registers


def rotated_keys(numbers: Numbers, q: jax.Array, rotation: Rotation, k_gain: jax.Array | None = None) -> Keys:
    """Keys `rotate(basis (k_gain c) + mean)` of coordinates c, or of keys without a basis."""
    inv_freq, at, basis, mean = rotation
    half, dtype, count = len(inv_freq), q.dtype, len(numbers.stored)

    def logits(q, pos, *tiles):
        tiles, turns, rest = tiles[:count], tiles[count], tiles[count + 1 :]
        basis, mean, at, gain = _given_back(given, rest)
        x = expanded(numbers.decoded(*tiles), basis)
        if gain is not None:
            x *= gain
        if mean is not None:
            x += mean
        cos, sin = cosine_and_sine(pos if at is None else at, turns, dtype)  # [H / 2, s]
        a, b = x[:half], x[half:]
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=0)
        return product(q.astype(dtype), rotated.astype(dtype))

    def expanded(x, basis):
        """f32[H, s]."""
        if basis is not None:
            return product(basis, x.astype(dtype), (1, 1 - numbers.slots))
        x = x.astype(jnp.float32) if numbers.slots == 1 else transposed(x)
        return x if numbers.factor == 1 else x * numbers.factor

    given = (
        None if basis is None else Stored((basis * numbers.factor).astype(dtype), None),
        None if mean is None else Stored(mean.astype(jnp.float32).reshape(-1, *mean.shape[-2:], 1), None),
        None if at is None else number_per_slot(at),
        None if k_gain is None else number_per_slot(k_gain.astype(jnp.float32)),
    )
    of_all = Stored(turns_per_token(inv_freq)[None, None, :, None], None)
    return Keys((*numbers.stored, of_all, *(x for x in given if x is not None)), logits)


def _given_back(places, values):
    """The values one after the other, at the places that are not None."""
    values = iter(values)
    return [None if place is None else next(values) for place in places]


def cost(read: Cost, k: jax.Array | Encoded, q: jax.Array, rotation: Rotation) -> Cost:
    """Returns the cost of keys that are rotated when they are read, of that of reading them."""
    given = {name: int(getattr(rotation, name) is not None) for name in ("basis", "at")}
    expanded = _EXPANDED * q.shape[3] * 4 + (8 * k.shape[3] if is_encoded(k) else 0)
    return Cost(read.stored + 4 * given["at"], read.expanded + expanded, read.step, (*read.key, *given.items()))


def unsupported(k: jax.Array | Encoded, q: jax.Array, pages: bool, rotation: Rotation) -> str | None:
    """Returns why keys cannot be rotated when they are read, or None."""
    if isinstance(k, Levels) and k.in_row > 1:
        return f"rotates levels with one run in a row, got {k.in_row}"
    if isinstance(k, Packed) and k.axis == "token" and k.group % SUBLANES:
        return f"rotates keys in groups of a multiple of {SUBLANES} channels, got {k.group}"
    if pages and (rotation.basis is not None or rotation.mean is not None):
        return "has no bases and means for pages"
    H = q.shape[3]
    return f"takes heads of a multiple of {2 * SUBLANES} channels, got {H}" if H % (2 * SUBLANES) else None
