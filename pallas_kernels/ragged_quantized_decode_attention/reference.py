"""Defines `ragged_quantized_decode_attention`: a page is a KV head, and the pages of a head are merged."""

from __future__ import annotations

import jax

from pallas_kernels.partial import Partial, spread_to_owned
from pallas_kernels.quantize_pack import Packed
from pallas_kernels.quantized_decode_attention.reference import quantized_decode_attention
from pallas_kernels.ragged_decode_attention.page_run import PageRun, over_pages


def ragged_quantized_decode_attention(
    q: jax.Array,
    k: Packed,
    v: Packed,
    owner: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    run: PageRun | None = None,
    *,
    kv_heads: int,
    bits: int,
    key_axis: str = "channel",
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """See `pallas_kernels.ragged_quantized_decode_attention.api.ragged_quantized_decode_attention`."""
    page = k_pos.shape[1] // owner.shape[1]

    def attend(owner, cut):
        def paged(x: Packed, axis: str) -> Packed:
            part = Packed(cut(x.words, 2), cut(x.affine, 2 if axis == "channel" else 3))
            return as_pages(part, owner.shape[1], axis)

        per_slot = lambda x: None if x is None else cut(x).reshape(*owner.shape, page)
        return quantized_decode_attention(
            spread_to_owned(q, owner, kv_heads),
            paged(k, key_axis),
            paged(v, "token"),
            q_pos,
            per_slot(k_pos),
            per_slot(bias),
            bits=bits,
            key_axis=key_axis,
            window=window,
            scale=scale,
        )

    return over_pages(attend, owner, kv_heads, run)


def as_pages(x: Packed, pages: int, axis: str) -> Packed:
    """[B, 1, P * page, H] -> [B, P, page, H], packed: pages as heads."""
    words, affine = x.words, x.affine
    words = words.reshape(words.shape[0], pages, -1, words.shape[3])
    if axis == "channel":
        return Packed(words, affine.reshape(affine.shape[0], pages, -1, affine.shape[3]))
    return Packed(words, affine.reshape(affine.shape[0], affine.shape[2], pages, -1).swapaxes(1, 2))


def in_a_row(x: Packed, axis: str) -> Packed:
    """The inverse of `as_pages`."""
    flat = lambda x: x.reshape(x.shape[0], 1, -1, x.shape[3])
    if axis == "channel":
        return Packed(flat(x.words), flat(x.affine))
    affine = x.affine.swapaxes(1, 2)  # [B, 2 * n, P, page]
    return Packed(flat(x.words), affine.reshape(affine.shape[0], 1, affine.shape[1], -1))
