"""Scores slots and keeps a budget of them that all layers share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from kvjax.budget import Budget, budget_rows, budget_slots
from kvjax.cache import Cache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments import Segment
from kvjax.segments.moves import written_after
from kvjax.segments.pooled import pool_layers
from kvjax.segments.ragged import RaggedSegment, SlotList
from kvjax.segments.segment import dense_tail
from kvjax.segments.slots import counts_by_owner
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.evict import Scorer, asks, check_protected, check_scorer
from kvjax.transforms.evict_by_head import HeadBudgets, choose, first_scores, pages_for
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule

LayerWeights = Callable[[Segment, LayerObservation], jax.Array]
"""`(segment, layer observation) -> f32[B]`: what the budget of a layer is proportional to, at least 0."""

_SCORE = "score"
_SLACK = 1e-3  # slots; equal weights give equal shares whatever float32 makes of them
_LARGEST = 1e30  # of a layer's weight: a sum over layers stays finite


def evict_across_layers(
    scorer: Scorer,
    budget: Budget,
    *,
    heads: HeadBudgets | None = None,
    layers: LayerWeights | None = None,
    sinks: int = 0,
    recent: Budget = 0,
    page: int = 16,
) -> CacheTransform:
    """Keeps `budget` slots per KV head on average over the whole cache, in one pool of pages for all layers.

    Either every head of every layer gets its own number (`heads`), or every layer does, the same for its heads
    (`layers`). Acts when the prompt is in. The pool's bytes follow the budget: L * K * budget slots, and at most
    L * K - 1 pages and L * K / 2 slots that rounding may need. Tokens that follow go to a dense segment of each layer.

    Layers are taken up one after the other, and the whole budget is shared out anew among those taken up so far
    (CAKE's cascade). Scores stay and what a head may keep only falls, so the end is what one choice over all layers
    would have kept, without a copy of the full cache. The compiler may still read all layers before it shrinks the
    first: a prefill in one program holds the full cache and the pool.

    Args:
      scorer: what a slot is worth.
      budget: tokens per KV head on average, as a count or as a fraction of each row's prompt.
      heads: how many slots each of the L * K heads keeps, beside the sinks and the recent tokens.
      layers: what the budgets of layers are proportional to, beside the same.
      sinks: first tokens of the sequence that every head keeps.
      recent: newest tokens that every head keeps: a count, or a fraction of the budget.
      page: slots of a page.

    Raises:
      TypeError: scorer is not a `Scorer`.
      ValueError: the budget cannot hold the sinks and the recent tokens, or both or neither of `heads` and `layers`
        are given.
    """
    check_scorer(scorer, "evict_across_layers")
    always = check_protected(budget, sinks, recent)
    if page < 1:
        raise ValueError(f"page must be at least 1 slot, got {page}.")
    if (heads is None) == (layers is None):
        raise ValueError("heads or layers must be given, and not both: either says how the budget is split.")

    @functools.partial(jax.jit, static_argnames=("slots", "count"))
    def take_up(pool, weights, segment: Segment, seen: LayerObservation, layer, rows, *, slots: int, count: int):
        """The pool with the slots of one more layer, and f32[B, L], the weights of the layers in it."""
        K = segment.pos.shape[1]
        if pool is not None:
            # Or XLA gathers keys and values of all layers at the very end, and holds every layer's until then.
            gathered = jnp.stack([pool.stored.k, pool.stored.values])
            segment = segment.with_slots(pos=written_after(gathered, segment.pos)[0])
        fresh = SlotList.of(segment.with_slots(stats={_SCORE: first_scores(scorer, segment, seen)}), layer * K)
        held = fresh if pool is None else pool.as_list().plus(fresh)
        split = heads
        if layers is not None:
            weight = jnp.nan_to_num(layers(segment, seen), posinf=_LARGEST)
            weights = weights.at[:, layer].set(jnp.clip(weight, 0.0, _LARGEST))
            split = proportional(weights)
        keep = choose(held.slots.stats[_SCORE][:, 0], held, rows, split, count * K, sinks, recent)
        pages = pages_for(count * K, slots, page)
        return RaggedSegment.of_list(held, keep, kv_heads=count * K, page=page, pages=pages), weights

    def init(cache: Cache, observation: Observation):
        slots, L = budget_slots(budget, observation.prompt_slots, always), len(cache.layers)
        slots = observation.slots_of(slots)
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots, always)
        pool, weights = None, jnp.zeros((rows.shape[0], L))
        for index, (layer, seen) in enumerate(zip(cache.layers, observation.each_layer(), strict=True)):
            tail = dense_tail(layer, "evict_across_layers")
            pool, weights = take_up(pool, weights, tail, seen, jnp.int32(index), rows, slots=slots, count=L)
        pool, views = pool_layers(pool.replace(stored=pool.stored.with_slots(stats={})), L)
        seen_by = lambda layer, view: layer.replace(
            segments=(*layer.segments[:-1], view, layer.segments[-1].no_slots())
        )
        cache = cache.map_layers(seen_by, views)
        return cache.replace(shared={**cache.shared, views[0].name: pool}), ()

    return CacheTransform(
        init=init,
        schedule=Schedule(
            acts_in=(),
            needs=scorer.needs,
            budget=budget,
            at_least=always,
            name="evict_across_layers",
            order=Order.of(asks(scorer, "vectors slots room places"), "whole aligned vectors slots own heads"),
        ),
    )


def proportional(weights: Float32[Array, "B L"]) -> HeadBudgets:
    """Splits a budget over layers by weight; the heads of a layer get the same.

    `n_l = floor(w_l / sum w * L n)`, at most what the layer has; what that leaves over is spread evenly over the
    layers with room, the first ones taking the remainder, until none is left over.

    Args:
      weights: f32[B, L]; where all are 0 the layers get the same.

    Source: Qin et al., CAKE (2025), section 3.
    """
    L = weights.shape[1]

    def allocate(scores: jax.Array, owner: jax.Array, per_head: jax.Array, heads: int) -> jax.Array:
        held = counts_by_owner(scores > -jnp.inf, owner, heads).reshape(-1, L, heads // L)
        most = jnp.max(held, axis=2)
        total = L * per_head[:, None]
        whole = jnp.sum(weights, axis=1, keepdims=True)
        share = jnp.where(whole > 0, weights / jnp.where(whole > 0, whole, 1.0), 1 / L)
        counts = jnp.minimum(jnp.floor(share * total + _SLACK).astype(jnp.int32), most)

        def spread(_, counts):
            room = counts < most
            left = jnp.maximum(total - jnp.sum(counts, axis=1, keepdims=True), 0)
            open_layers = jnp.maximum(jnp.sum(room, axis=1, keepdims=True), 1)
            more = left // open_layers + (jnp.cumsum(room, axis=1) <= left % open_layers)
            return jnp.minimum(counts + jnp.where(room, more, 0), most)

        counts = jax.lax.fori_loop(0, L + 1, spread, counts)  # each time a layer fills up, or nothing is left over
        return jnp.repeat(counts, heads // L, axis=1)

    return allocate
