"""Dense pages of KV heads on Hopper GPUs. Lowered for CUDA, never run on a GPU.

The dense kernel over one list of slots, those of all pages. The rows of its products are the queries of all heads, of
which each sees the slots of its own; without them most rows would be empty. Blocks take equal numbers of slots, whoever
owns them, so the work is that of the pages and falls on all multiprocessors alike. Of a run of pages, all are read.

Pages behind the last whole tile, fewer than 64 slots, are left to the reference and merged.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.mosaic_gpu_dense import ROWS, SLOTS, as_rows, attend, by_token
from pallas_kernels.decode_attention.pages import Pages
from pallas_kernels.dispatch import Kernel
from pallas_kernels.partial import Partial, combine


def _unsupported(q, k, v, q_pos, k_pos, bias, pages: Pages, *, window=None, scale=None) -> str | None:
    """Why the kernel cannot run these arguments, or None if it can."""
    del q_pos, k_pos, bias, window, scale
    _, T, N, H = q.shape
    S, P = k.shape[2], pages.owner.shape[1]
    page = S // P
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"takes bfloat16 queries, keys and values, got {q.dtype}, {k.dtype} and {v.dtype}"
    if H not in (64, 128, 256) or v.shape[-1] != H:
        return f"takes heads of 64, 128 or 256 in q, k and v alike, got {H} and {v.shape[-1]}"
    if not 0 < T * N <= ROWS:
        return f"takes 1 to {ROWS} queries of all heads, got T * N = {T * N} of q {list(q.shape)}"
    if page % 8 or (SLOTS % page and page % SLOTS):
        return f"takes pages of 8, 16, 32 or a multiple of {SLOTS} slots, got {page}"
    if S < SLOTS:
        return f"takes at least {SLOTS} slots in all pages, got {P} pages of {page}"
    return None


def _decode_attention(q, k, v, q_pos, k_pos, bias, pages: Pages, *, window=None, scale=None) -> Partial:
    B, T, N, _ = q.shape
    owner, kv_heads, run = pages.owner, pages.kv_heads, pages.run
    S, P = k.shape[2], owner.shape[1]
    page = S // P
    if run is not None:
        k_pos = jnp.where(jnp.repeat(run.has(jnp.arange(P)), page, axis=1)[:, None], k_pos, -1)
    rows, row_pos = as_rows(q, q_pos, 1, scale)
    head = jnp.arange(ROWS, dtype=jnp.int32) % N // (N // kv_heads)  # rows are tokens times heads
    flat = lambda x: None if x is None else x[:, 0]
    partials = attend(
        rows,
        T * N,
        flat(k),
        flat(v),
        row_pos,
        flat(k_pos),
        flat(bias),
        jnp.broadcast_to(head, (B, ROWS)),
        jnp.repeat(owner, page, axis=1),
        window=window,
    )
    partials = [by_token(partial, B, T, N) for partial in partials]
    first = S // SLOTS * SLOTS
    if first < S:
        rest = lambda x: None if x is None else x[:, :, first:]
        slots = q, rest(k), rest(v), q_pos, rest(k_pos), rest(bias)
        behind = Pages(owner[:, first // page :], kv_heads)
        partials.append(reference.decode_attention(*slots, pages=behind, window=window, scale=scale))
    return combine(partials)


kernel = Kernel(_decode_attention, _unsupported)
