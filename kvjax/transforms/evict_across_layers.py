"""Scores slots and keeps a budget of them that all layers share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kvjax.budget import budget_rows, budget_slots
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments import DenseSegment
from kvjax.segments.dense import dense_tail
from kvjax.segments.pooled import pool_layers
from kvjax.transforms.base import PLAIN, CacheTransform
from kvjax.transforms.evict import Scorer, check_protected, check_protected_fit
from kvjax.transforms.evict_by_head import HeadBudgets, choose, in_pages, slot_scores

LayerWeights = Callable[[DenseSegment, LayerObservation], jax.Array]
"""`(segment, layer observation) -> f32[B]`: what the budget of a layer is proportional to, at least 0."""


def evict_across_layers(
    scorer: Scorer,
    budget: int | float,
    *,
    heads: HeadBudgets | None = None,
    layers: LayerWeights | None = None,
    sinks: int = 0,
    recent: int | float = 0,
    page: int = 16,
) -> CacheTransform:
    """Keeps `budget` slots per KV head on average over the whole cache, in one pool of pages for all layers.

    Either every head of every layer gets its own number (`heads`), or every layer does, the same for its heads
    (`layers`). Acts when the prompt is in, on the full cache, of which gathering makes one copy. The pool's bytes
    follow the budget: L * K * budget slots, and at most L * K - 1 pages and L * K / 2 slots that rounding may need.
    Tokens that follow go to a dense segment of each layer.

    Args:
      scorer: what a slot is worth.
      budget: tokens per KV head on average, as a count or as a fraction of each row's prompt.
      heads: how many slots each of the L * K heads keeps, beside the sinks and the recent tokens.
      layers: what the budgets of layers are proportional to, beside the same.
      sinks: first tokens of the sequence that every head keeps.
      recent: newest tokens that every head keeps: a count, or a fraction of the budget.
      page: slots of a page.

    Raises:
      ValueError: the budget cannot hold the sinks and the recent tokens, or both or neither of `heads` and `layers`
        are given.
    """
    recent_count = check_protected(budget, sinks, recent)
    if page < 1:
        raise ValueError(f"page must be at least 1 slot, got {page}.")
    if (heads is None) == (layers is None):
        raise ValueError("heads or layers must be given, and not both: either says how the budget is split.")

    @jax.jit
    def rate(layer: LayerCache, seen: LayerObservation):
        segment = dense_tail(layer, "evict_across_layers")
        return slot_scores(scorer, segment, seen), None if layers is None else layers(segment, seen)

    @functools.partial(jax.jit, static_argnames="slots")
    def gather(segments: Sequence[DenseSegment], found, rows: jax.Array, *, slots: int):
        widest = max(segment.pos.shape[2] for segment in segments)
        segments = [segment.replace(stats={}).resize(widest) for segment in segments]
        widen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[2])), constant_values=-jnp.inf)
        scores = jnp.concatenate([widen(x) for x, _ in found], axis=1)  # [B, L * K, S]
        split = heads or proportional(jnp.stack([weight for _, weight in found], axis=1))
        together = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *segments)
        keep = choose(scores, together.pos, rows, split, sinks, recent)
        return pool_layers(in_pages(together, keep, slots, page), len(segments))

    def init(cache: Cache, observation: Observation):
        slots = budget_slots(budget, observation.prompt_slots)
        check_protected_fit(budget, observation.prompt_slots, sinks, recent_count)
        rows = budget_rows(budget, observation.prompt, observation.prompt_slots)
        found = [rate(*each) for each in zip(cache.layers, observation.layers, strict=True)]
        segments = [dense_tail(layer, "evict_across_layers") for layer in cache.layers]
        pool, views = gather(segments, found, rows, slots=slots)
        seen_by = lambda layer, view: layer.replace(
            segments=(*layer.segments[:-1], view, layer.segments[-1].no_slots())
        )
        cache = cache.map_layers(seen_by, views)
        return cache.replace(shared={**cache.shared, views[0].name: pool}), ()

    return CacheTransform(
        init=init, needs=scorer.needs, budget=budget, name="evict_across_layers", takes=PLAIN, leaves="shared"
    )


def proportional(weights: jax.Array) -> HeadBudgets:
    """Splits a budget over layers by weight; the heads of a layer get the same.

    `n_l = floor(w_l / sum w * L n)`, at most what the layer has; what that leaves over is spread evenly over the
    layers with room, the first ones taking the remainder, until none is left over.

    Args:
      weights: f32[B, L]; where all are 0 the layers get the same.

    Source: Qin et al., CAKE (2025), section 3.
    """
    L = weights.shape[1]

    def allocate(scores: jax.Array, per_head: jax.Array) -> jax.Array:
        B = scores.shape[0]
        held = jnp.sum(scores > -jnp.inf, axis=-1).reshape(B, L, -1)
        K, most = held.shape[2], jnp.max(held, axis=2)
        total = L * per_head[:, None]
        whole = jnp.sum(weights, axis=1, keepdims=True)
        share = jnp.where(whole > 0, weights / jnp.where(whole > 0, whole, 1.0), 1 / L)
        counts = jnp.minimum(jnp.floor(share * total).astype(jnp.int32), most)

        def spread(_, counts):
            room = counts < most
            left = jnp.maximum(total - jnp.sum(counts, axis=1, keepdims=True), 0)
            open_layers = jnp.maximum(jnp.sum(room, axis=1, keepdims=True), 1)
            more = left // open_layers + (jnp.cumsum(room, axis=1) <= left % open_layers)
            return jnp.minimum(counts + jnp.where(room, more, 0), most)

        counts = jax.lax.fori_loop(0, L + 1, spread, counts)  # each time a layer fills up, or nothing is left over
        return jnp.repeat(counts, K, axis=1)

    return allocate
