"""Attention over a part of the keys, and the one way to merge such parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32


class Partial(NamedTuple):
    """Softmax attention over some of the slots: `out = sum_s p_s v_s`, `lse = log sum_s exp(logit_s)`.

    `p` is normalised within the part. A query that sees nothing has `out = 0` and `lse = -inf`.
    """

    out: Float32[Array, "B T N H"]
    lse: Float32[Array, "B T N"]


def combine(partials: Sequence[Partial]) -> Partial:
    """Merges attention over disjoint sets of slots into attention over their union, exactly.

    With `m = max_i lse_i` and `w_i = exp(lse_i - m)`:
    `out = sum_i w_i out_i / sum_i w_i`, `lse = m + log sum_i w_i`.

    Associative and commutative. Serves segments of a layer, split-K inside a kernel, shared prefixes
    and, with collectives in place of the sums (`combine_shards`), shards of the slot axis.

    Args:
      partials: one or more parts, each `out` f32[B, T, N, H] and `lse` f32[B, T, N].

    Returns:
      The part that covers the union. Where no part sees a slot it is `(0, -inf)`.

    Source: Dao, FlashAttention-2 (2023), section 3.1; Milakov and Gimelshein (2018).
    """
    if not partials:
        raise ValueError("partials must hold at least one Partial, got none.")
    if len(partials) == 1:
        return partials[0]
    m = partials[0].lse
    for p in partials[1:]:
        m = jnp.maximum(m, p.lse)
    m_finite = jnp.where(m == -jnp.inf, 0.0, m)
    weights = [jnp.exp(p.lse - m_finite) for p in partials]
    total = sum(weights[1:], weights[0])
    inverse = 1.0 / jnp.where(total == 0.0, 1.0, total)
    out = sum((w * inverse)[..., None] * p.out for w, p in zip(weights, partials))
    return Partial(out=out, lse=m_finite + jnp.log(total))


def combine_shards(partial: Partial, axes: Sequence[str]) -> Partial:
    """`combine` over the shards of a mesh, each with attention over its own slots: sums become collectives.

    Args:
      partial: this shard's, inside `jax.shard_map`.
      axes: of the mesh, over which the slots are split.

    Returns:
      The part that covers the slots of all shards, the same on each.
    """
    m = jax.lax.pmax(jax.lax.stop_gradient(partial.lse), axes)
    m = jnp.where(m == -jnp.inf, 0.0, m)
    weight = jnp.exp(partial.lse - m)
    out, total = jax.lax.psum((weight[..., None] * partial.out, weight), axes)
    return Partial(out=out / jnp.where(total == 0.0, 1.0, total)[..., None], lse=m + jnp.log(total))


def combine_by_owner(
    partial: Partial, owner: Int32[Array, "B P"], owners: int, *, only: Bool[Array, "B P"] | None = None
) -> Partial:
    """Merges the parts that belong together when that is data: pages of a ragged cache into its heads.

    The same merge as `combine`, over axis P instead of over a list.

    Args:
      partial: `out` f32[B, T, P * G, H], `lse` f32[B, T, P * G]: P parts with G queries each.
      owner: i32[B, P], which of the `owners` a part belongs to.
      owners: [K]; the result has K * G queries. One without parts is `(0, -inf)`.
      only: bool[B, P], the parts that count. None: all.

    Returns:
      `Partial(out f32[B, T, K * G, H], lse f32[B, T, K * G])`.
    """
    B, T, _, H = partial.out.shape
    P = owner.shape[1]
    parts = lambda x: x.reshape(B, T, P, -1, *x.shape[3:]).swapaxes(1, 2)  # [B, P, T, G, ...]
    out, lse = parts(partial.out), parts(partial.lse)
    if only is not None:
        lse = jnp.where(only[:, :, None, None], lse, -jnp.inf)
    each = lambda reduce: jax.vmap(lambda x, ids: reduce(x, ids, num_segments=owners))
    m = each(jax.ops.segment_max)(lse, owner)  # [B, K, T, G]; -inf where there is nothing
    m = jnp.where(m == -jnp.inf, 0.0, m)
    weight = jnp.exp(lse - jnp.take_along_axis(m, owner[:, :, None, None], axis=1))
    total = each(jax.ops.segment_sum)(weight, owner)
    summed = each(jax.ops.segment_sum)(weight[..., None] * out, owner)
    summed = summed / jnp.where(total == 0.0, 1.0, total)[..., None]
    merged = lambda x: x.swapaxes(1, 2).reshape(B, T, -1, *x.shape[4:])
    return Partial(out=merged(summed), lse=merged(m + jnp.log(total)))


def spread_to_owned(x: jax.Array, owner: jax.Array, owners: int) -> Float[Array, "B T P*G ..."]:
    """[B, T, K * G, ...] -> [B, T, P * G, ...]: to each of P parts what belongs to its owner i32[B, P] of K."""
    B, T, N = x.shape[:3]
    grouped = x.reshape(B, T, owners, N // owners, *x.shape[3:])
    index = owner.reshape(B, 1, -1, *(1,) * (grouped.ndim - 3))
    return jnp.take_along_axis(grouped, index, axis=2).reshape(B, T, -1, *x.shape[3:])


def fold(attend: Callable[[jax.Array | int], Partial], count: jax.Array | int) -> Partial:
    """Merges `attend(0) .. attend(count - 1)`, one after the other; `count` may be data."""
    like = jax.eval_shape(lambda: attend(0))
    nothing = Partial(jnp.zeros(like.out.shape, jnp.float32), jnp.full(like.lse.shape, -jnp.inf))
    return jax.lax.fori_loop(0, count, lambda i, merged: combine([merged, attend(i)]), nothing)


def fold_tiles(attend: Callable[[jax.Array | int, int], Partial], slots: int, tile: int) -> Partial:
    """Merges attention over S slots, a tile at a time: what is expanded to be read exists for one tile only.

    Args:
      attend: `(start, size) -> Partial` over slots `start .. start + size`; `start` may be traced.
      slots: [S].
      tile: slots of a tile; the last one may be smaller.
    """
    count, rest = divmod(slots, tile)
    if count == 0:
        return attend(0, rest)
    if count == 1:
        partial = attend(0, tile)
    else:
        partial = fold(lambda i: attend(i * tile, tile), count)
    return combine([partial, attend(count * tile, rest)]) if rest else partial
