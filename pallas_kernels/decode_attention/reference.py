"""Defines `decode_attention`, written so that XLA makes good code of it on CPU."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.pages import PageRun, Pages, over_pages
from pallas_kernels.decode_attention.rotation import Rotation
from pallas_kernels.encoded import Encoded, block_of, cut, is_encoded
from pallas_kernels.logits import Scale, capped, factor
from pallas_kernels.partial import Partial, fold_tiles, spread_to_owned
from pallas_kernels.visibility import visible

_TILE = 512  # slots that are decoded or expanded at a time; a float32 tile of 8 heads of 128 channels is 2 MB
_ROTATED = 4096  # slots that are rotated at a time where there is nothing to expand: cosines are cheaper in bulk
_LOGITS = 2**24  # held at a time: 64 MB


class _Slots(NamedTuple):
    """All that belongs to slots, or to a tile of them."""

    k: jax.Array | Encoded  # [B, K or 1, S, R]
    v: jax.Array | Encoded | None  # [B, K or 1, S, H']
    pos: jax.Array  # i32[B, K or 1, S], and the rest alike
    bias: jax.Array | None
    k_gain: jax.Array | None
    v_gain: jax.Array | None
    at: jax.Array | None  # what keys are rotated by, where that is not `pos`

    def map(self, function) -> _Slots:
        """Applies a function to all that is there."""
        return _Slots(*(None if x is None else function(x) for x in self))


def decode_attention(
    q: jax.Array,
    k: jax.Array | Encoded,
    v: jax.Array | Encoded | None,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    k_gain: jax.Array | None = None,
    v_gain: jax.Array | None = None,
    rotation: Rotation | None = None,
    pages: Pages | None = None,
    *,
    window: int | None = None,
    scale: Scale | None = None,
) -> Partial:
    """See `pallas_kernels.decode_attention.api.decode_attention`."""
    slots = _Slots(k, v, k_pos, bias, k_gain, v_gain, None if rotation is None else rotation.at)
    attend = functools.partial(_of_heads, q_pos=q_pos, window=window, scale=scale)
    if pages is None:
        return attend(q, slots, rotation)
    run, encoded = pages.run, any(map(is_encoded, (k, v)))
    B, P = pages.owner.shape
    if run is None and encoded:  # some pages at a time, so that no more than these are ever decoded
        run = PageRun(jnp.zeros(B, jnp.int32), jnp.full(B, P, jnp.int32))
    page = k_pos.shape[2] // P

    def of_pages(owner, cut):
        def paged(x):
            x = cut(x)
            x = x.decode(q.dtype) if is_encoded(x) else x
            return x.reshape(*owner.shape, page, *x.shape[3:])

        rotated = None if rotation is None else rotation.of_owners(owner)
        return attend(spread_to_owned(q, owner, pages.kv_heads), slots.map(paged), rotated)

    return over_pages(of_pages, pages.owner, pages.kv_heads, run)


def _of_heads(q, slots: _Slots, rotation: Rotation | None, *, q_pos, window, scale) -> Partial:
    """Attends to slots tile by tile, where not all of them may be decoded, expanded or multiplied at a time."""
    B, T, N = q.shape[:3]
    S, stored = slots.pos.shape[2], [x for x in (slots.k, slots.v) if x is not None]
    if S == 0:
        return Partial(jnp.zeros((B, T, N, stored[-1].shape[3]), jnp.float32), jnp.full((B, T, N), -jnp.inf))
    tile = max(_LOGITS // max(B * T * N, 1) // _TILE, 1) * _TILE
    if any(is_encoded(x) or x.dtype.itemsize == 1 for x in stored) or rotation and rotation.basis is not None:
        tile = min(tile, _TILE)
    elif rotation:
        tile = min(tile, _ROTATED)
    block = block_of(*stored)

    def read(x):
        """Codes are decoded, and 8-bit floats widened; a rotation is done in the queries' dtype."""
        if is_encoded(x):
            return x.decode(q.dtype)
        return x.astype(q.dtype) if x.dtype.itemsize == 1 or rotation else x

    def attend(start, size):
        part = slots.map(lambda x: cut(x, start, size))
        k = read(part.k)
        v = k if part.v is None else read(part.v)
        if rotation is None:
            return _of_tile(q, part._replace(k=k, v=v), q_pos, window, scale)
        inside = rotation.mean is not None
        k = rotation.keys(k, part.pos if part.at is None else part.at, part.k_gain if inside else None)
        return _of_tile(q, part._replace(k=k, v=v, k_gain=None if inside else part.k_gain), q_pos, window, scale)

    return fold_tiles(attend, S, max(tile // block, 1) * block)


def _of_tile(q, slots: _Slots, q_pos, window, scale) -> Partial:
    """Attends to slots that lie there as numbers."""
    k, v = slots.k, slots.v
    (B, T, N, H), (heads, S) = q.shape, k.shape[1:3]
    K = math.lcm(*(x.shape[1] for x in slots if x is not None))
    qs = q.reshape(B, T, heads, N // heads, H) * jnp.asarray(factor(scale, H), q.dtype)
    qs = qs.transpose(0, 2, 1, 3, 4).reshape(B, heads, -1, H).astype(k.dtype)
    # For one token slots lead the product: XLA's CPU backend runs [S, H] @ [H, G] up to 1.7 times faster than
    # [G, H] @ [H, S]. The softmax wants slots minor, or its loops do not vectorise (experiments/bench_decode.py).
    if T == 1:
        logits = jnp.einsum("bksh,bkrh->bksr", k, qs, preferred_element_type=jnp.float32).swapaxes(-1, -2)
    else:
        logits = jnp.einsum("bkrh,bksh->bkrs", qs, k, preferred_element_type=jnp.float32)
    logits = _regrouped(logits.reshape(B, heads, T, N // heads, S), K)
    if slots.k_gain is not None:
        logits *= slots.k_gain.astype(jnp.float32)[:, :, None, None]
    logits = capped(logits, scale)
    if slots.bias is not None:
        logits += slots.bias.astype(jnp.float32)[:, :, None, None]
    mask = visible(q_pos[:, None], slots.pos, window)[:, :, :, None]  # [B, K or 1, T, 1, S]
    logits = jnp.where(mask, logits, -jnp.inf)
    m = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    m = jnp.where(m == -jnp.inf, 0.0, m)
    p = jnp.exp(logits - m)
    total = jnp.sum(p, axis=-1)  # [B, K, T, G]
    if slots.v_gain is not None:
        p *= slots.v_gain.astype(jnp.float32)[:, :, None, None]
    heads = v.shape[1]
    p = _regrouped(p, heads).reshape(B, heads, -1, S)
    out = jnp.einsum("bkrs,bksh->bkrh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = _regrouped(out.reshape(B, heads, T, N // heads, v.shape[-1]), K)
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    lse = m[..., 0] + jnp.log(total)
    return Partial(
        out=out.transpose(0, 2, 1, 3, 4).reshape(B, T, N, v.shape[-1]),
        lse=lse.transpose(0, 2, 1, 3).reshape(B, T, N),
    )


def _regrouped(x: jax.Array, heads: int) -> jax.Array:
    """[B, K, T, G, X] -> [B, heads, T, N / heads, X] of the same queries."""
    B, K, T, G, X = x.shape
    return x if K == heads else x.swapaxes(1, 2).reshape(B, T, heads, -1, X).swapaxes(1, 2)
