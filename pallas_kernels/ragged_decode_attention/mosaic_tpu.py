"""`ragged_decode_attention` on TPU: the decode skeleton over one list of slots, which the queries of all heads read.

Every tile of pages is multiplied by all T * N queries, of which each sees the slots of its own head. The matrix unit
holds the slots and streams the queries, so up to its height the queries of other heads take no time; the time is that
of reading the pages, once each, whoever owns them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sizes
from pallas_kernels.decode_attention.mosaic_tpu import dense_keys, dense_values, vmem_bytes
from pallas_kernels.dispatch import Kernel
from pallas_kernels.partial import Partial
from pallas_kernels.tpu_decode import LEAST_SLOTS, MOST_ROWS, Keys, Stored, attend, logits_bytes, padded_rows
from pallas_kernels.tpu_decode_blocks import Blocks, blocks

_LANES = 128
_UNIT = 8  # slots that one entry of the owners stands for, at most
_MOST_HEADS = 256  # numbers that bfloat16 holds exactly


def owned_keys(k: jax.Array, owner: jax.Array, queries: tuple[int, int], kv_heads: int, dtype) -> Keys:
    """Keys [B, 1, S, H] whose owners i32[B, 1, 1, S / unit] see them; `queries` are (T, N)."""
    dense = dense_keys(k, dtype)
    T, N = queries
    unit = k.shape[2] // owner.shape[3]

    def logits(q, pos, tile, owner):
        n, s = owner.shape[1], pos.shape[1]
        # Owners of slots from owners of units: a product with zeros and ones.
        slot = jax.lax.broadcasted_iota(jnp.int32, (n, s), 1)
        first = jax.lax.broadcasted_iota(jnp.int32, (n, s), 0) * unit
        spread = ((slot >= first) & (slot < first + unit)).astype(jnp.float32).astype(jnp.bfloat16)
        owner = owner.astype(jnp.float32).astype(jnp.bfloat16)
        of_slot = jnp.dot(owner, spread, preferred_element_type=jnp.float32)  # [1, s]
        query = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0), jnp.int32(N))
        head = jax.lax.div(query, jnp.int32(N // kv_heads)).astype(jnp.float32)
        return jnp.where(of_slot == head, dense.logits(q, pos, tile), -jnp.inf)

    return Keys((*dense.stored, Stored(owner, 3, unit)), logits)


def _sizes(q, k, v, owner) -> Blocks | None:
    one_head = [jax.ShapeDtypeStruct((x.shape[0], 1, *x.shape[1:]), x.dtype) for x in (k, v)]
    widened = sum(x.shape[2] * q.dtype.itemsize for x in (k, v) if x.dtype.itemsize == 1)
    # Owners fill lanes in every tile but a single one; the matrix that spreads them has a row for each.
    expanded = widened + logits_bytes(q, 1) + 8 * _LANES
    unit = _unit(k, owner)
    step = _LANES * unit
    key = block_sizes.key(
        rows=padded_rows(q, 1), H=k.shape[2], H_v=v.shape[2], unit=unit, q=q.dtype, k=k.dtype, v=v.dtype
    )
    sizes = sum(map(vmem_bytes, one_head)) + 4, expanded
    return blocks("ragged_decode_attention.mosaic_tpu", key, 1, k.shape[1], *sizes, step=step, most=step)


def _unsupported(q, k, v, owner, q_pos, k_pos, bias=None, run=None, *, kv_heads, window, scale) -> str | None:
    rows = q.shape[1] * q.shape[2]
    if rows > MOST_ROWS:
        return f"takes up to {MOST_ROWS} queries of all heads, got T * N = {rows} of q {list(q.shape)}"
    if kv_heads > _MOST_HEADS:
        return f"takes up to {_MOST_HEADS} KV heads, got {kv_heads}"
    if k.shape[1] < LEAST_SLOTS:
        return f"takes {LEAST_SLOTS} slots or more, got k {list(k.shape)}"
    if _sizes(q, k, v, owner) is None:
        return f"finds no tile of [S, H] = {list(k.shape[1:])} that fits"
    return None


def _page(k, owner) -> int:
    """Slots of a page."""
    return k.shape[1] // owner.shape[1]


def _unit(k, owner) -> int:
    """Slots that one entry of the owners stands for in the kernel: a page, or a part of it."""
    return math.gcd(_page(k, owner), _UNIT)


def _repeated(x: jax.Array, times: int) -> jax.Array:
    """`jnp.repeat(x, times, axis=1)` in int32, of up to 256; as a product: repeating makes a row of lanes of each."""
    B, P = x.shape
    rows = jnp.pad(x, ((0, 0), (0, -P % _LANES))).reshape(B, -1, _LANES).astype(jnp.bfloat16)
    spread = np.repeat(np.eye(_LANES), times, axis=1)
    return jnp.dot(rows, spread.astype(jnp.bfloat16)).astype(jnp.int32).reshape(B, -1)[:, : P * times]


def _ragged_decode_attention(q, k, v, owner, q_pos, k_pos, bias=None, run=None, *, kv_heads, window, scale) -> Partial:
    T, N = q.shape[1:3]
    page = _page(k, owner)
    one_head = lambda x: x[:, None]
    units = _repeated(owner, page // _unit(k, owner))[:, None, None]
    return attend(
        q,
        owned_keys(one_head(k), units, (T, N), kv_heads, q.dtype),
        dense_values(one_head(v), q.dtype),
        q_pos,
        one_head(k_pos),
        None if bias is None else one_head(bias),
        None if run is None else (run.first * page, (run.first + run.count) * page),
        sizes=_sizes(q, k, v, owner),
        window=window,
        scale=scale,
    )


kernel = Kernel(_ragged_decode_attention, _unsupported)
