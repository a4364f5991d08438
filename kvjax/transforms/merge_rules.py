"""What becomes of the slots above a budget: added to similar keys, to neighbours, or to the highest of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kvjax.segments.slots import LAST, highest_first, highest_slot, marked, places, ranks, token_order, without_rounding
from kvjax.transforms.merge import MergeRule, Moves, Ranked

Weigh = Literal["mean", "pivot", "similarity", "attention"]
"""How much the slots that go to another count beside it."""

_BLOCK = 256  # slots that are compared with all others at a time
_LEAST = jnp.iinfo(jnp.int32).min
_ROUNDING = 1e-5  # of a cosine in float32: slots that are alike are alike on any machine


def into_nearest(smoothing: float = 0.5) -> MergeRule:
    """Gives up the slots of lowest worth; each goes to the slot of most similar key, or is dropped.

    `u_e = max_c cos(k_e, k_c)` over the slots that stay, `w_e = exp(u_e) / exp(1)`, e being similar to itself by 1.
    A slot is dropped where `u_e < tau`. For every row of a layer `tau` is the mean of u over heads and slots the
    first time anything is given up, and moves towards that mean each time after, before it is applied:
    `tau = (1 - smoothing) tau + smoothing mean(u)`.

    Args:
      smoothing: how much the newest mean counts.

    Source: Wan et al., D2O (2024), sections 3.3 and 3.4.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing}.")

    def move(ranked: Ranked, threshold: jax.Array) -> tuple[Moves, jax.Array]:
        S = ranked.worth.shape[2]
        slots, real = ranked.lowest(ranked.worth)
        stays = ranked.occupied & ~marked(slots, real, S)
        similarity, into = _nearest((ranked.segment.k,), ranked.segment.pos, slots, stays)
        count = jnp.sum(real, axis=(1, 2))
        mean = jnp.sum(jnp.where(real, similarity, 0.0), axis=(1, 2)) / jnp.maximum(count, 1)
        moved = jnp.where(threshold == -jnp.inf, mean, (1 - smoothing) * threshold + smoothing * mean)
        threshold = jnp.where(count > 0, moved, threshold)
        into = jnp.where(similarity >= threshold[:, None, None] - _ROUNDING, into, S)
        return Moves(slots, real, into, jnp.exp(similarity - 1)), threshold

    return MergeRule(move, start=lambda batch: jnp.full((batch,), -jnp.inf, jnp.float32))


def into_similar(weigh: Weigh = "pivot", by_values: bool = False, least: float = -1.0) -> MergeRule:
    """Gives up the slots of lowest worth; each goes to the slot of most similar key that stays, or is dropped.

    With n slots that go to slot c, and u the cosine of their keys to that of c, c becomes
    `(x_c + sum x_e) / (1 + n)` ("mean"), the same with `(x_e + x_c) / 2` in place of `x_e` ("pivot"), or
    `(x_c + sum u_e x_e) / (1 + sum u_e)` ("similarity"; slots whose u is below the mean of all, or 0, are dropped), or
    `(x_c + sum w_e x_e) / (1 + sum w_e)` with `w_e = min(s_e / s_c, 1)` of the scores ("attention").

    Args:
      weigh: "mean", "pivot", "similarity" or "attention".
      by_values: u is the product of the cosines of keys and of values.
      least: slots whose u is lower are dropped.

    Source: Wan et al., LOOK-M (2024), arXiv:2406.18139, section 3.3; "attention" and values: EMS (2024).
    """
    if weigh not in get_args(Weigh):
        raise ValueError(f"weigh must be one of {', '.join(get_args(Weigh))}, got {weigh!r}.")
    if not -1 <= least <= 1:
        raise ValueError(f"least must be a cosine in [-1, 1], got {least}.")

    def move(ranked: Ranked, state: tuple) -> tuple[Moves, tuple]:
        B, K, S = ranked.worth.shape
        slots, real = ranked.lowest(ranked.worth)
        stays = ranked.occupied & ~marked(slots, real, S)
        segment = ranked.segment
        vectors = (segment.k, segment.values_apart("into_similar by values")) if by_values else (segment.k,)
        similarity, into = _nearest(vectors, segment.pos, slots, stays)
        into = jnp.where(real & (similarity > -jnp.inf) & (similarity >= least - _ROUNDING), into, S)
        if weigh == "attention":
            score = lambda index: jnp.take_along_axis(ranked.scores, index, axis=-1)
            own, taker = score(slots), score(jnp.minimum(into, S - 1))
            weight = jnp.clip(own / jnp.maximum(taker, 1e-30), 0.0, 1.0)
        elif weigh == "mean":
            weight = jnp.ones(slots.shape)
        elif weigh == "pivot":
            rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
            taken = jnp.zeros((B, K, S + 1)).at[rows, heads, into].add(1.0)
            weight = 1 / (2 + jnp.take_along_axis(taken, into, axis=-1))
        else:
            count = jnp.maximum(jnp.sum(real, axis=-1, keepdims=True), 1)
            mean = jnp.sum(jnp.where(real, similarity, 0.0), axis=-1, keepdims=True) / count
            alike = (similarity >= mean - _ROUNDING) & (similarity > 0)
            into, weight = jnp.where(alike, into, S), jnp.maximum(similarity, 0.0)
        return Moves(slots, real, into, weight), state

    return MergeRule(move)


def into_next(count: int = 16) -> MergeRule:
    """Gives up the slots of lowest worth; their values are added to the `count` tokens after them that stay.

    Of a slot e, `p v_e / m` is added to each of the m <= count tokens that follow, `p = s_e / mean(s of these)`, at
    most 1, s being the scores. Keys stay as they are. Of more than `count` slots that are given up at once only the
    newest `count` are added: the others, of a prompt, are dropped.

    Args:
      count: tokens that share a value, at least 1.

    Source: Zhang, Du et al., CaM (2024), section 4; kvpress, `CAMPress`.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 token, got {count}.")

    def move(ranked: Ranked, state: tuple) -> tuple[Moves, tuple]:
        S, pos = ranked.worth.shape[2], ranked.segment.pos
        slots, real = ranked.lowest(ranked.worth)
        most = min(count, slots.shape[2])
        given_pos = jnp.where(real, jnp.take_along_axis(pos, slots, axis=-1), -1)
        newest, source = jax.lax.top_k(given_pos, most)  # [B, K, F]
        stays = ranked.occupied & ~marked(slots, real, S)
        order = token_order(jnp.where(stays, pos, -1))
        at = jnp.take_along_axis(jnp.where(stays, pos, LAST), order, axis=-1)
        find = jax.vmap(jax.vmap(lambda sorted_pos, x: jnp.searchsorted(sorted_pos, x, side="right")))
        place = find(at, newest)[..., None] + jnp.arange(count)  # [B, K, F, count]
        held = jnp.sum(stays, axis=-1)[..., None, None]
        there = (place < held) & (newest >= 0)[..., None]
        into = jax.vmap(jax.vmap(lambda x, i: x[i]))(order, jnp.minimum(place, S - 1))
        score_of = jax.vmap(jax.vmap(lambda x, i: x[i]))(ranked.scores, into)
        followers = jnp.sum(there, axis=-1)
        mean = jnp.sum(jnp.where(there, score_of, 0.0), axis=-1) / jnp.maximum(followers, 1)
        own = jnp.take_along_axis(ranked.scores, jnp.take_along_axis(slots, source, axis=-1), axis=-1)
        share = jnp.clip(own / jnp.maximum(mean, 1e-30), 0.0, 1.0)
        weight = jnp.where(there, (share / jnp.maximum(followers, 1))[..., None], 0.0)
        flat = lambda x: x.reshape(*x.shape[:2], -1)
        source = jnp.broadcast_to(source[..., None], into.shape)
        return Moves(slots, real, flat(jnp.where(there, into, S)), flat(weight), flat(source)), state

    return MergeRule(move, values_only=True, mean=False)


def into_neighbour() -> MergeRule:
    """Gives up the slots of lowest worth; each goes to the slot of nearest position that stays, the older of a tie.

    A slot becomes the plain mean of what it was and of all it takes up.

    Source: Liu et al., Elastic Cache (2024), arXiv:2407.18121, section 3.2.
    """

    def move(ranked: Ranked, state: tuple) -> tuple[Moves, tuple]:
        S, pos = ranked.worth.shape[2], ranked.segment.pos
        slots, real = ranked.lowest(ranked.worth)
        order = token_order(pos)
        sort = lambda x: jnp.take_along_axis(x, order, axis=-1)
        stays, at = sort(ranked.occupied & ~marked(slots, real, S)), sort(pos)
        older = jax.lax.cummax(jnp.where(stays, jnp.arange(S), -1), axis=2)
        newer = jax.lax.cummin(jnp.where(stays, jnp.arange(S), S), axis=2, reverse=True)
        position = lambda place: jnp.take_along_axis(at, jnp.clip(place, 0, S - 1), axis=-1)
        closer = (newer >= S) | (at - position(older) <= position(newer) - at)
        place = jnp.where((older >= 0) & closer, older, newer)
        into = jnp.where(place < S, jnp.take_along_axis(order, jnp.clip(place, 0, S - 1), axis=-1), S)
        into = jnp.take_along_axis(into, jnp.argsort(order, axis=-1), axis=-1)
        return Moves(slots, real, jnp.take_along_axis(into, slots, axis=-1), jnp.ones(slots.shape)), state

    return MergeRule(move)


def into_runs(threshold: float = 0.75, width: float = 5.0, heavy: float = 0.24) -> MergeRule:
    """Merges runs of neighbouring tokens with similar keys into the token of the run that is worth most.

    Two neighbours are linked where `cos(k_i, k_(i - 1)) > threshold`; of these links the most similar hold, as many
    as there are slots to give up. Tokens linked in a row are a run; p, the one of highest worth, takes up the others
    with `w_i = exp(-||k_p - k_i||^2 / (2 width^2))`. Where there are too few links, the slots of lowest worth that
    are then left are dropped. Protected slots and the `heavy` highest are in no run.

    Args:
      threshold: cosine below which neighbours are never merged.
      width: of the Gaussian kernel, in the unit of keys.
      heavy: slots of highest worth, beside the protected, that stay as they are, as a fraction of the budget.

    Source: Wang, Jin et al., KVMerger (2024), sections 4.1 and 4.2.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine in [-1, 1], got {threshold}.")
    if width <= 0:
        raise ValueError(f"width must be above 0, got {width}.")
    if not 0 <= heavy <= 1:
        raise ValueError(f"heavy must be a fraction of the budget in [0, 1], got {heavy}.")

    def move(ranked: Ranked, state: tuple) -> tuple[Moves, tuple]:
        S = ranked.worth.shape[2]
        order = token_order(ranked.segment.pos)
        sort = lambda x: jnp.take_along_axis(x, order[(...,) + (None,) * (x.ndim - 3)], axis=2)
        keys, worth = sort(ranked.segment.k).astype(jnp.float32), sort(ranked.worth)
        free = sort(ranked.occupied & ~ranked.protected & ~_heaviest(ranked, heavy))
        norm = jnp.maximum(jnp.linalg.norm(keys, axis=-1), 1e-12)
        cosine = jnp.sum(keys[:, :, 1:] * keys[:, :, :-1], axis=-1) / (norm[..., 1:] * norm[..., :-1])
        cosine = without_rounding(cosine)
        cosine = jnp.where(free[..., 1:] & free[..., :-1] & (cosine > threshold), cosine, -jnp.inf)
        cosine = jnp.pad(cosine, ((0, 0), (0, 0), (1, 0)), constant_values=-jnp.inf)
        linked = (cosine > -jnp.inf) & (ranks(-cosine) < ranked.excess[..., None])
        run = jnp.cumsum(~linked, axis=-1) - 1  # which run a token is in, from 0
        pivot = _highest_of_run(worth, run)  # the place in the order of that run's pivot
        merged = pivot != jnp.arange(S)
        of_pivot = jnp.take_along_axis(keys, pivot[..., None], axis=2)
        weight = jnp.exp(-jnp.sum((of_pivot - keys) ** 2, axis=-1) / (2 * width**2))
        into = jnp.where(merged, jnp.take_along_axis(order, pivot, axis=-1), S)
        back = jnp.argsort(order, axis=-1)
        merged, into, weight = (jnp.take_along_axis(x, back, axis=-1) for x in (merged, into, weight))
        slots, real = ranked.lowest(jnp.where(merged, _LEAST, ranked.worth))
        into, weight = (jnp.take_along_axis(x, slots, axis=-1) for x in (into, weight))
        return Moves(slots, real, into, weight), state

    return MergeRule(move)


def _heaviest(ranked: Ranked, fraction: float) -> jax.Array:
    """bool[B, K, S]: the protected slots and, of the others, the highest, as many as a fraction of the budget."""
    count = jnp.floor(fraction * ranked.rows + 1e-3).astype(jnp.int32)[:, None]
    count = jnp.sum(ranked.protected, axis=-1) + count
    return places(highest_first(ranked.worth, ranked.segment.pos)) < count[..., None]


def _highest_of_run(worth: jax.Array, run: jax.Array) -> jax.Array:
    """i32[B, K, S]: for every place, in token order, that of the highest worth in its run; of a tie the oldest."""
    S = worth.shape[-1]
    order = jnp.argsort(~worth, axis=-1, stable=True)
    of_run = jax.vmap(jax.vmap(lambda x, r: jax.ops.segment_min(x, r, S, indices_are_sorted=True)[r]))
    return jnp.take_along_axis(order, of_run(places(order), run), axis=-1)


def _nearest(
    vectors: Sequence[jax.Array], pos: jax.Array, slots: jax.Array, stays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The highest cosine of each of some slots with those that stay, and where it is; of a tie the oldest.

    Args:
      vectors: [B, K, S, H] each; of several, cosines are multiplied.
      pos: i32[B, K, S].
      slots: i32[B, K, E].
      stays: bool[B, K, S].

    Returns:
      `(f32[B, K, E], i32[B, K, E])`.
    """
    vectors = [x.astype(jnp.float32) if x.dtype.itemsize == 1 else x for x in vectors]
    norms = [jnp.maximum(jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1)), 1e-12) for x in vectors]

    def block(index):
        similarity = 1.0
        for x, norm in zip(vectors, norms):
            picked = jnp.take_along_axis(x, index[..., None], axis=2)
            dot = jnp.einsum("bkeh,bksh->bkes", picked, x, preferred_element_type=jnp.float32)
            similarity = similarity * dot / (jnp.take_along_axis(norm, index, axis=-1)[..., None] * norm[:, :, None])
        similarity = without_rounding(similarity)
        return highest_slot(jnp.where(stays[:, :, None], similarity, -jnp.inf), pos[:, :, None])

    E = slots.shape[2]
    if E <= _BLOCK:
        return block(slots)
    B, K, _ = slots.shape
    blocks = jnp.pad(slots, ((0, 0), (0, 0), (0, -E % _BLOCK))).reshape(B, K, -1, _BLOCK)
    found = jax.lax.map(block, jnp.moveaxis(blocks, 2, 0))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(B, K, -1)[..., :E] for x in found)
