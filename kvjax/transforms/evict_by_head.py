"""Scores slots and keeps a budget of them that the heads of a layer share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from kvjax.budget import Budget, budget_rows, budget_slots
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation, of_head
from kvjax.segments import Segment
from kvjax.segments.ragged import RaggedSegment, SlotList, split_pages
from kvjax.segments.slots import counts_by_owner, places, priority, ranks, ranks_by_owner, sums_by_owner
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.evict import Scorer, asks, check_protected, check_scorer, is_protected, slot_scores
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule

HeadBudgets = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
"""`(f32[B, M] scores, i32[B, M] heads of the slots, i32[B] tokens per head, K) -> i32[B, K]`: how many of its slots
each head keeps.

Slots that are empty or kept in any case score `-inf`, others something finite; they come oldest token first, and of a
token the lowest head first, so that whoever breaks ties in this order does not depend on where slots lie. A row's sum
should be K times its tokens per head; each head's share may be rounded.
"""

_PARTS = 1024  # of a slot, to which shares are exact before they are rounded: a half is a half on any machine


def adaptive(floor: float = 0.2, normalise: bool = False) -> HeadBudgets:
    """Gives a head the slots it has among the K * n highest scores of its layer, and at least a floor.

    `n_h = round((1 - floor) * a_h + floor * n)`, where `a_h` counts the head's slots among the highest.

    Args:
      floor: fraction of the uniform share that every head gets.
      normalise: multiply a head's scores by the fraction of their sum that its n highest hold, before heads
        are compared.

    Source: Feng et al., Ada-KV (2024), algorithm 1 and its official code.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor}.")

    def allocate(scores: jax.Array, owner: jax.Array, per_head: jax.Array, heads: int) -> jax.Array:
        if normalise:
            mass = jnp.where(scores == -jnp.inf, 0.0, scores)
            highest = ranks_by_owner(-scores, owner, heads) < per_head[:, None]
            top = sums_by_owner(jnp.where(highest, mass, 0.0), owner, heads)
            share = top / jnp.maximum(sums_by_owner(mass, owner, heads), 1e-12)
            scores = scores * jnp.take_along_axis(share, owner, axis=1)
        chosen = ranks(-scores) < heads * per_head[:, None]
        counts = counts_by_owner(chosen & (scores > -jnp.inf), owner, heads)
        share = (1 - floor) * counts + floor * per_head[:, None].astype(jnp.float32)
        return jnp.round(jnp.round(share * _PARTS) / _PARTS).astype(jnp.int32)

    return allocate


def evict_by_head(
    scorer: Scorer,
    budget: Budget,
    *,
    heads: HeadBudgets,
    sinks: int = 0,
    recent: Budget = 0,
    page: int = 16,
) -> CacheTransform:
    """Keeps `budget` slots per KV head on average over a layer, each head its own number, in pages.

    The total of a layer is fixed, so bytes follow the budget: K * budget slots, and at most K - 1 pages and K / 2
    slots that rounding may need. Tokens that follow go to a dense segment. `update` takes them into the pages and
    shares the budget out anew; the scorer then sees one head at a time, and must not need statistics of the past.

    Args:
      scorer: what a slot is worth.
      budget: tokens per KV head on average, as a count or as a fraction of each row's prompt.
      heads: how many slots each head keeps, beside the sinks and the recent tokens.
      sinks: first tokens of the sequence that every head keeps.
      recent: newest tokens that every head keeps: a count, or a fraction of the budget.
      page: slots of a page.

    Raises:
      TypeError: scorer is not a `Scorer`.
      ValueError: the budget cannot hold the sinks and the recent tokens.
    """
    check_scorer(scorer, "evict_by_head")
    always = check_protected(budget, sinks, recent)
    if page < 1:
        raise ValueError(f"page must be at least 1 slot, got {page}.")

    @functools.partial(jax.jit, static_argnames="count")
    def share_out(pages: RaggedSegment | None, tail: Segment, seen: LayerObservation, rows, *, count: int):
        if not tail.pos.shape[2]:
            tail = tail.resize(1)  # scorers need not know of segments without slots
        K, tail = tail.pos.shape[1], tail.with_slots(stats={})
        held = SlotList.of(tail)
        if pages is None:
            scores = first_scores(scorer, tail, seen).reshape(held.owner.shape)
        else:
            held = pages.as_list().plus(held)
            scores = scores_by_head(scorer, held, K, seen)
        keep = choose(scores, held, rows, heads, K, sinks, recent)
        return RaggedSegment.of_list(held, keep, kv_heads=K, page=page, pages=count)

    def shrink(cache: Cache, rows: jax.Array, observation: Observation, emptied: Callable):
        """Takes the slots of every layer's tail into its pages, and leaves of the tail what `emptied` does."""
        slots = observation.slots_of(budget_slots(budget, observation.prompt_slots, always))

        def each(layer: LayerCache, seen: LayerObservation):
            before, pages, tail = split_pages(layer, "evict_by_head")
            count = pages_for(tail.pos.shape[1], slots, page) if pages is None else pages.owner.shape[1]
            pages = share_out(pages, tail, seen, rows, count=count)
            return layer.replace(segments=(*before, pages, emptied(tail)))

        return cache.map_layers(each, observation.each_layer())

    def init(cache: Cache, observation: Observation):
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots, always)
        return shrink(cache, rows, observation, Segment.no_slots), rows

    def update(cache: Cache, rows: jax.Array, observation: Observation):
        if scorer.stats:
            raise ValueError(
                f"evict_by_head keeps no statistics after the prompt, but its scorer wants {', '.join(scorer.stats)}: "
                "wrap it in at_prefill_end."
            )
        return shrink(cache, rows, observation, lambda tail: tail.drop(tail.pos >= 0)), rows

    def excess(cache: Cache, observation: Observation) -> jax.Array:
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots, always)

        def of(layer: LayerCache) -> jax.Array:
            _, pages, tail = split_pages(layer, "evict_by_head")
            held = jnp.sum(tail.pos >= 0, axis=(1, 2)) + (0 if pages is None else jnp.sum(pages.pos >= 0, axis=(1, 2)))
            K = tail.pos.shape[1]
            return (held + K // 2) // K - rows  # heads' numbers are rounded: pages may hold half a slot a head less

        return jnp.max(jnp.stack([of(layer) for layer in cache.layers]), axis=0)

    return CacheTransform(
        init=init,
        update=update,
        schedule=Schedule(
            needs=scorer.needs,
            frees_in_prefill=1,
            frees_in_decode=1,
            budget=budget,
            excess=excess,
            at_least=always,
            name="evict_by_head",
            order=Order.of(asks(scorer, "vectors slots room places"), "whole aligned vectors slots heads"),
        ),
    )


def first_scores(scorer: Scorer, segment: Segment, seen: LayerObservation) -> Float32[Array, "B K S"]:
    """f32[B, K, S]: what a scorer that has seen nothing before makes of a whole prompt; `-inf` for empty slots only."""
    stats = {name: jnp.zeros(segment.pos.shape, jnp.float32) for name in scorer.stats}
    segment = scorer.observe(segment.with_slots(stats=stats), seen)
    finite = jnp.clip(slot_scores(scorer, segment, seen), jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max)
    return jnp.where(segment.pos >= 0, finite, -jnp.inf)


def scores_by_head(scorer: Scorer, held: SlotList, kv_heads: int, seen: LayerObservation) -> Float32[Array, "B M"]:
    """f32[B, M]: the same for slots in one list, a head after the other."""
    score = lambda head: first_scores(scorer, held.of_head(head), of_head(seen, head, kv_heads))[:, 0]
    each = jax.lax.map(score, jnp.arange(kv_heads))  # [K, B, M]
    return jnp.take_along_axis(each, held.owner[None], axis=0)[0]


def choose(
    scores: Float32[Array, "B M"],
    held: SlotList,
    rows: Int32[Array, " B"],
    heads: HeadBudgets,
    count: int,
    sinks: int,
    recent: Budget,
) -> Bool[Array, "B M"]:
    """bool[B, M]: the slots that stay, when heads share `count` times the budgets i32[B] `rows`.

    Args:
      scores: f32[B, M], finite; those of empty slots do not count.
      held: slots of the heads `0 .. count - 1`; all of one that has any include its protected ones.
      rows: i32[B], tokens per head.
      heads: how many slots each head keeps, beside the protected ones.
      count: heads.
      sinks: see `is_protected`.
      recent: the same.
    """
    oldest_first = jnp.lexsort((held.owner, held.slots.pos[:, 0]), axis=-1)
    pos, owner, scores = (
        jnp.take_along_axis(x, oldest_first, axis=1) for x in (held.slots.pos[:, 0], held.owner, scores)
    )
    protected = is_protected(pos[:, None], rows, sinks, recent)[:, 0]
    always = jnp.minimum(counts_by_owner(protected, owner, count), rows[:, None])  # [B, count]
    free = jnp.where(protected | (pos < 0), -jnp.inf, scores)
    limit = always + heads(free, owner, rows - always[:, 0], count)
    place = ranks_by_owner(~priority(scores, pos, protected), owner, count)
    keep = (pos >= 0) & (place < jnp.take_along_axis(limit, owner, axis=1))
    return jnp.take_along_axis(keep, places(oldest_first), axis=1)


def pages_for(heads: int, slots: int, page: int) -> int:
    """Pages that hold `heads * slots` slots however they are split, and what rounding each head's share may add."""
    return -(-(heads * slots + heads // 2) // page) + heads - 1
