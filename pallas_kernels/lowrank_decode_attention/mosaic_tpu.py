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
from pallas_kernels.tpu_decode import Keys, Stored, attend, logits_bytes, padded_rows, product, row_limit
from pallas_kernels.tpu_decode_blocks import Blocks, blocks

_SUBLANES = 8
_EXPANDED = 6  # float32 arrays [H, s] of a head: keys, rotated keys, angles, cosines, sines, and one more


def expanded_keys(k: jax.Array, basis: jax.Array, inv_freq: jax.Array, mean: jax.Array | None, dtype) -> Keys:
    """Keys `rotate(basis c + mean)` of coordinates c."""
    stored = as_laid_out(k)
    K, H = basis.shape[1:3]
    mean = jnp.zeros((K, H), jnp.float32) if mean is None else mean.astype(jnp.float32)

    def logits(q, pos, tile, basis, mean, inv_freq):
        x = product(basis, widened(tile, dtype).astype(dtype), (1, 1 if stored.axis == 2 else 0)) + mean  # [H, s]
        angle = inv_freq * pos.astype(jnp.float32)  # [H / 2, s]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = x[: H // 2], x[H // 2 :]
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=0)
        return product(q.astype(dtype), rotated.astype(dtype))

    of_heads = (basis.astype(dtype), mean[None, ..., None], inv_freq.astype(jnp.float32)[None, None, :, None])
    return Keys((stored, *(Stored(x, None) for x in of_heads)), logits)


def _sizes(q, k, v, basis, k_pos) -> Blocks | None:
    K, H = basis.shape[1:3]
    stored = sum(vmem_bytes(x) * x.shape[1] / K for x in (k, v))
    widened = sum(x.shape[3] * q.dtype.itemsize for x in (k, v) if x.dtype.itemsize == 1)
    key = block_sizes.key(
        heads=K,
        rows=padded_rows(q, K),
        H=H,
        R=k.shape[3],
        R_v=v.shape[3],
        shared=int(k.shape[1] < K),
        q=q.dtype,
        k=k.dtype,
        v=v.dtype,
    )
    sizes = stored + 4, widened + _EXPANDED * H * 4 + logits_bytes(q, K)
    return blocks("lowrank_decode_attention.mosaic_tpu", key, K, k_pos.shape[2], *sizes)


def _unsupported(q, k, v, basis, inv_freq, q_pos, k_pos, mean=None, bias=None, *, window, scale) -> str | None:
    K, H = basis.shape[1:3]
    limit = row_limit(q, K, k_pos.shape[2])
    if limit is not None:
        return limit
    if H % (2 * _SUBLANES):
        return f"takes heads of a multiple of {2 * _SUBLANES} channels, got {H}"
    if _sizes(q, k, v, basis, k_pos) is None:
        return f"finds no tile of [K, S, R] = {[K, *k.shape[2:]]} that fits"
    return None


def _lowrank_decode_attention(q, k, v, basis, inv_freq, q_pos, k_pos, mean=None, bias=None, **how) -> Partial:
    return attend(
        q,
        expanded_keys(k, basis, inv_freq, mean, q.dtype),
        dense_values(v, q.dtype),
        q_pos,
        k_pos,
        bias,
        sizes=_sizes(q, k, v, basis, k_pos),
        **how,
    )


kernel = Kernel(_lowrank_decode_attention, _unsupported)
