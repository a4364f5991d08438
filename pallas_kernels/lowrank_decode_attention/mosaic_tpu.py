"""`lowrank_decode_attention` on TPU: the decode skeleton over coordinates that are expanded and rotated in VMEM.

Keys are expanded with slots along lanes, where positions lie, and channels along sublanes, where the two halves of a
rotation are parted without moving anything.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import block_sizes
from pallas_kernels.decode_attention.mosaic_tpu import as_laid_out, dense_values, vmem_bytes, widened
from pallas_kernels.dispatch import Kernel
from pallas_kernels.partial import Partial
from pallas_kernels.tpu_decode import (
    Keys,
    Stored,
    attend,
    logits_bytes,
    number_per_slot,
    padded_rows,
    product,
    row_limit,
)
from pallas_kernels.tpu_decode_blocks import Blocks, blocks
from pallas_kernels.tpu_rotation import cosine_and_sine, turns_per_token

_SUBLANES = 8
_EXPANDED = 3  # float32 arrays [H, s] of a head: keys, rotated keys, cosines and sines; the rest is in registers


def expanded_keys(
    k: jax.Array,
    basis: jax.Array | None,
    inv_freq: jax.Array,
    mean: jax.Array | None,
    at: jax.Array | None,
    dtype,
) -> Keys:
    """Keys `rotate(basis c + mean)` of coordinates c, or of keys without a basis."""
    stored, half = as_laid_out(k), len(inv_freq)

    def logits(q, pos, tile, turns, *rest):
        basis, mean, at = _given_back(given, rest)
        x = expanded(tile, basis)
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
    )
    of_all = Stored(turns_per_token(inv_freq)[None, None, :, None], None)
    return Keys((stored, of_all, *(x for x in given if x is not None)), logits)


def _given_back(places, values):
    """The values one after the other, at the places that are not None."""
    values = iter(values)
    return [None if place is None else next(values) for place in places]


def _heads(q, k, basis) -> tuple[int, int]:
    """(K, H) of the keys that are attended to."""
    return (k.shape[1], q.shape[3]) if basis is None else basis.shape[1:3]


def _sizes(q, k, v, basis, k_pos, at) -> Blocks | None:
    K, H = _heads(q, k, basis)
    stored = sum(vmem_bytes(x) * x.shape[1] / K for x in (k, v))
    widened = sum(x.shape[3] * q.dtype.itemsize for x in (k, v) if x.dtype.itemsize == 1)
    key = block_sizes.key(
        heads=K,
        rows=padded_rows(q, K),
        H=H,
        R=k.shape[3],
        R_v=v.shape[3],
        shared=int(k.shape[1] < K),
        basis=int(basis is not None),
        at=int(at is not None),
        q=q.dtype,
        k=k.dtype,
        v=v.dtype,
    )
    sizes = stored + (4 if at is None else 8), widened + _EXPANDED * H * 4 + logits_bytes(q, K)
    return blocks("lowrank_decode_attention.mosaic_tpu", key, K, k_pos.shape[2], *sizes, rows=padded_rows(q, K))


def _unsupported(
    q, k, v, basis, inv_freq, q_pos, k_pos, mean=None, bias=None, at=None, *, window, scale
) -> str | None:
    K, H = _heads(q, k, basis)
    limit = row_limit(q, K, k_pos.shape[2])
    if limit is not None:
        return limit
    if H % (2 * _SUBLANES):
        return f"takes heads of a multiple of {2 * _SUBLANES} channels, got {H}"
    if _sizes(q, k, v, basis, k_pos, at) is None:
        return f"finds no tile of [K, S, R] = {[K, *k.shape[2:]]} that fits"
    return None


def _lowrank_decode_attention(q, k, v, basis, inv_freq, q_pos, k_pos, mean=None, bias=None, at=None, **how) -> Partial:
    return attend(
        q,
        expanded_keys(k, basis, inv_freq, mean, at, q.dtype),
        dense_values(v, q.dtype),
        q_pos,
        k_pos,
        bias,
        sizes=_sizes(q, k, v, basis, k_pos, at),
        **how,
    )


kernel = Kernel(_lowrank_decode_attention, _unsupported)
