"""Keeps the slots of highest worth and mixes all others into a few, by a trained convolution."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.budget import Budget, budget_rows, budget_slots, check_budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.rope import rotate
from kvjax.segments.segment import Segment, dense_tail, unrotated
from kvjax.segments.slots import LAST, highest_first, keep_highest, places
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.evict import Scorer, check_protected, check_scorer, is_protected, worth_keeping
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule


def convolve(
    scorer: Scorer, budget: Budget, merged: int, *, sinks: int = 0, recent: Budget = 0
) -> CacheTransform:
    """Keeps `budget - merged` slots per KV head as they are, and mixes the rest into `merged` slots.

    `k' = W k`, `v' = W v` over the rest, in token order, with `W = (1 - mix) one_hot + mix softmax(relu(conv(k, v)))`.
    Row c of `one_hot` picks the c-th, in token order, of the `merged` highest of the rest; the new slot takes its
    position. Keys are mixed un-rotated. Rows with no more tokens than their budget are left alone. The convolution is
    `LayerObservation.learned`; see `mixing_weights` and `kvjax.transforms.learned`.

    Args:
      scorer: what a slot is worth; it keeps no statistics.
      budget: tokens per KV head, as a count or as a fraction of each row's prompt.
      merged: slots that the rest becomes.
      sinks: first tokens of the sequence that stay as they are.
      recent: newest tokens that do: a count, or a fraction of the budget.

    Raises:
      TypeError: scorer is not a `Scorer`.
      ValueError: the budget cannot hold the merged slots, the sinks and the recent tokens; or the scorer keeps
        statistics.
    """
    check_scorer(scorer, "convolve")
    least = merged + max(1, check_protected(budget, sinks, recent))
    check_budget(budget, at_least=least, holds=f"{merged} merged slots and {least - merged} that stay")
    if scorer.stats:
        raise ValueError(f"convolve keeps no statistics, but its scorer wants {', '.join(scorer.stats)}.")

    def shrink(segment: Segment, seen: LayerObservation, rows: jax.Array, slots: int) -> Segment:
        S = segment.pos.shape[2]
        if S <= slots:
            return segment.resize(slots)
        occupied = segment.pos >= 0
        if slots < least:  # there are no more tokens than slots
            return segment.take(*keep_highest(segment.pos, segment.pos, slots))
        worth = worth_keeping(scorer, segment, seen, is_protected(segment.pos, rows, sinks, recent))
        place, rows = places(highest_first(worth, segment.pos)), rows[:, None, None]
        stays = occupied & (place < rows - merged)
        kept = segment.take(*_earliest(segment.pos, stays, slots - merged))
        # No row gives up more; one of rows' budgets may be rounded the other way.
        index, there = _earliest(segment.pos, occupied & ~stays, min(S, S - slots + merged + 1))
        rest = segment.take(index, there)
        picked = jnp.take_along_axis(place, index, axis=-1) < rows
        pivot, real = _earliest(rest.pos, there & picked, merged)
        new, rope = rest.take(pivot, real), seen.queries.rope
        mix = jnp.where(jnp.sum(occupied, axis=-1, keepdims=True) > rows, seen.learned["mix"], 0.0)[..., None]
        raw, own = unrotated(rest, rope), unrotated(new, rope)
        weights = mixing_weights(seen.learned, raw.k, raw.v, there)

        def mixed(own, x):
            each = jnp.einsum("bkcp,bkph->bkch", weights, x.astype(jnp.float32))
            return ((1 - mix) * own.astype(jnp.float32) + mix * each).astype(x.dtype)

        k, v = mixed(own.k, raw.k), mixed(own.v, raw.v)
        k = rotate(k, new.pos, rope) if segment.key_rope == "stored" else k
        changed = real[..., None] & (mix > 0)  # keys that are turned back and forth for nothing would lose digits
        new = new.replace(k=jnp.where(changed, k, new.k), v=jnp.where(changed, v, new.v))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), kept, new)

    @functools.partial(jax.jit, static_argnames=("slots", "room"))
    def act(layer: LayerCache, seen: LayerObservation, rows: jax.Array, *, slots: int, room: bool):
        segment = dense_tail(layer, "convolve")
        segment.values_apart("convolve")
        small = shrink(segment, seen, rows, min(slots, segment.pos.shape[2]) if room else slots)
        return layer.with_tail(small.resize(segment.pos.shape[2]) if room else small)

    def run(cache: Cache, observation: Observation, *, room: bool):
        slots = observation.slots_of(budget_slots(budget, observation.prompt_slots, least))
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots, least)
        return cache.map_layers(lambda layer, seen: act(layer, seen, rows, slots=slots, room=room), observation.layers)

    def init(cache: Cache, observation: Observation):
        return run(cache, observation, room=False), ()

    return CacheTransform(
        init=init,
        update=lambda cache, state, observation: (run(cache, observation, room=True), state),
        schedule=Schedule(
            needs=scorer.needs,
            frees_in_prefill=1,
            frees_in_decode=1,
            budget=budget,
            at_least=least,
            name="convolve",
            order=Order.of(needs="vectors slots room", loses="whole aligned"),
        ),
    )


def mixing_weights(
    conv: Mapping[str, jax.Array], k: Float[Array, "B K P H"], v: Float[Array, "B K P H"], there: Bool[Array, "B K P"]
) -> jax.Array:
    """`softmax_p(relu(conv(concat(k, v))))`, f32[B, K, C, P]: how much of each slot goes into each of C new ones.

    Args:
      conv: `kernel` f32[width, 2 H, C] and `bias` f32[C], which the heads of a layer share.
      k: [B, K, P, H], un-rotated, in token order.
      v: [B, K, P, H].
      there: bool[B, K, P], the first ones; the others count as zeros and get nothing.
    """
    B, K, P, _ = k.shape
    x = jnp.concatenate([k, v], axis=-1).astype(jnp.float32)
    x = jnp.where(there[..., None], x, 0.0).reshape(B * K, P, -1)
    dims = ("NWC", "WIO", "NWC")
    logits = jax.lax.conv_general_dilated(x, conv["kernel"], (1,), "SAME", dimension_numbers=dims) + conv["bias"]
    logits = jax.nn.relu(logits).reshape(B, K, P, -1)
    return jax.nn.softmax(logits, axis=2, where=there[..., None]).swapaxes(2, 3)


def _earliest(pos: jax.Array, chosen: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The first `count` chosen slots in token order, i32[B, K, count], and bool[B, K, count], which are real."""
    _, index = jax.lax.top_k(-jnp.where(chosen, pos, LAST), count)
    return index, jnp.take_along_axis(chosen, index, axis=-1)
