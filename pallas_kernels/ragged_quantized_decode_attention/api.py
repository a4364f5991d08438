"""`ragged_quantized_decode_attention`: the name by which callers still ask for packed pages."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention import PageRun, Pages, decode_attention
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Axis, Packed
from pallas_kernels.quantize_pack.api import told


def ragged_quantized_decode_attention(
    q: jax.Array,
    k: Packed,
    v: Packed,
    owner: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    kv_heads: int,
    bits: int | None = None,
    key_axis: Axis | None = None,
    bias: jax.Array | None = None,
    run: PageRun | None = None,
    **how,
) -> Partial:
    """`decode_attention` with `Pages(owner, kv_heads, run)`, of k and v [B, 1, S, H], k_pos and bias [B, S]."""
    told(k, bits=bits, axis=key_axis)
    bias = None if bias is None else bias[:, None]
    return decode_attention(q, k, v, q_pos, k_pos[:, None], bias=bias, pages=Pages(owner, kv_heads, run), **how)


def as_pages(x: Packed, pages: int, axis: str | None = None) -> Packed:
    """[B, 1, P * page, H] -> [B, P, page, H], packed: pages as heads."""
    words, affine = x.words, x.affine
    words = words.reshape(words.shape[0], pages, -1, words.shape[3])
    if x.axis == "channel":
        return x.replace(words=words, affine=affine.reshape(affine.shape[0], pages, -1, affine.shape[3]))
    affine = affine.reshape(affine.shape[0], affine.shape[2], pages, -1).swapaxes(1, 2)
    return x.replace(words=words, affine=affine)


def in_a_row(x: Packed, axis: str | None = None) -> Packed:
    """The inverse of `as_pages`."""
    flat = lambda x: x.reshape(x.shape[0], 1, -1, x.shape[3])
    if x.axis == "channel":
        return x.replace(words=flat(x.words), affine=flat(x.affine))
    affine = x.affine.swapaxes(1, 2)  # [B, 2 * n, P, page]
    return x.replace(words=flat(x.words), affine=affine.reshape(affine.shape[0], 1, affine.shape[1], -1))
