"""Scores slots, keeps a budget of them, and adds the others to those that stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from kvjax.budget import Budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation, Quota
from kvjax.segments.segment import Segment, dense_tail
from kvjax.segments.slots import keep_highest, lowest_first, lowest_slot, marked, priority
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.evict import (
    Scorer,
    asks,
    check_protected,
    check_scorer,
    is_protected,
    observer_of,
    slot_scores,
    with_stats,
)
from kvjax.transforms.layer_budgets import LayerBudgets, excess_over, split_budget
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule

_FEW = 8  # slots up to which each is written by itself: the tokens of a decoding step, and room in whole tiles


class Ranked(NamedTuple):
    """Slots of a layer with what each is worth, for a rule to decide what becomes of them."""

    segment: Segment
    scores: Float32[Array, "B K S"]  # what the scorer says of each slot
    worth: Int32[Array, "B K S"]  # of which only the order means anything; protected slots above all others
    protected: Bool[Array, "B K S"]  # always kept
    rows: Int32[Array, " B"]  # slots that may stay
    most: int  # [E], no head of any row gives up more than this

    @property
    def occupied(self) -> Bool[Array, "B K S"]:
        """bool[B, K, S]."""
        return self.segment.pos >= 0

    @property
    def excess(self) -> Int32[Array, "B K"]:
        """i32[B, K], slots to give up."""
        return jnp.maximum(jnp.sum(self.occupied, axis=-1) - self.rows[:, None], 0)

    def lowest(self, worth: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The excess slots of lowest worth, the newest of a tie: i32[B, K, E], and bool[B, K, E], which are real."""
        pos = self.segment.pos
        if self.most == 1:  # a token of a decoding step: no sort
            slots = lowest_slot(worth, pos)[..., None]
        else:
            slots = lowest_first(worth, pos)[..., : self.most]
        return slots, jnp.arange(self.most) < self.excess[..., None]


class Moves(NamedTuple):
    """Which slots are given up, and which slots take them up."""

    slots: Int32[Array, "B K E"]
    real: Bool[Array, "B K E"]  # false where a head gives up fewer than E
    into: Int32[Array, "B K F"]  # the slot that takes one up; S: none, its token is dropped
    weight: Float32[Array, "B K F"]  # beside the weight 1 of the slot that takes it up
    source: Int32[Array, "B K F"] | None = None  # which of the E is taken up; None: each by one slot, F = E


class MergeRule(NamedTuple):
    """Says what becomes of the slots above a budget.

    Attributes:
      move: `(ranked slots, state) -> (moves, state)`.
      start: `batch -> state`, every leaf with the batch in front.
      values_only: keys stay as they are.
      mean: weights are those of a mean, in which the slot itself has the weight 1; False: weighted slots are added.
    """

    move: Callable[[Ranked, Any], tuple[Moves, Any]]
    start: Callable[[int], Any] = lambda batch: ()
    values_only: bool = False
    mean: bool = True


def merge(
    scorer: Scorer,
    budget: Budget,
    rule: MergeRule,
    *,
    sinks: int = 0,
    recent: Budget = 0,
    layers: LayerBudgets | None = None,
    log_count: bool = False,
) -> CacheTransform:
    """Keeps `budget` slots per KV head and adds the others to them, where the rule says so.

    A slot c that takes up slots e becomes `k_c = (k_c + sum_e w_e k_e) / (1 + sum_e w_e)`, `v_c` alike, and keeps
    its position and statistics. Keys are averaged as they are stored, rotated at the position of each.

    `init` gathers what stays into a segment of `budget` slots. `update` does the same in place, slot by slot.

    Args:
      scorer: what a slot is worth.
      budget: tokens per KV head, as a count or as a fraction of each row's prompt.
      rule: which slots are given up, and what takes them up: `into_nearest`, `into_runs`.
      sinks: first tokens of the sequence that are always kept, as they are unless others are added to them.
      recent: newest tokens that are always kept: a count, or a fraction of the budget.
      layers: splits the budget unevenly over the layers.
      log_count: adds to the logits of a slot the log of how many tokens it stands for (4 bytes a slot).

    Raises:
      TypeError: scorer is not a `Scorer`, or rule not a `MergeRule`.
      ValueError: the budget cannot hold the sinks and the recent tokens.
    """
    check_scorer(scorer, "merge")
    if not isinstance(rule, MergeRule):
        raise TypeError(f"merge needs a MergeRule, such as kvjax.into_nearest(), got {rule!r}.")
    always = check_protected(budget, sinks, recent)

    def shrink(segment: Segment, seen: LayerObservation, rows: jax.Array, slots: int, state):
        most = segment.pos.shape[2] - slots  # rows hold no more than `slots`, and what was reserved for new tokens
        if most <= 0:
            return segment, state
        protected = is_protected(segment.pos, rows, sinks, recent)
        scores = slot_scores(scorer, segment, seen.replace(quota=Quota(rows, protected)))
        worth = priority(scores, segment.pos, protected)
        moves, state = rule.move(Ranked(segment, scores, worth, protected, rows, most), state)
        return move(segment, moves, values_only=rule.values_only, mean=rule.mean), state

    @functools.partial(jax.jit, static_argnames="slots")
    def compress(layer: LayerCache, seen: LayerObservation, rows: jax.Array, *, slots: int):
        segment = dense_tail(layer, "merge")
        if segment.pos.shape[2] < slots:
            segment = segment.resize(slots)
        if log_count and segment.bias is None:
            segment = segment.with_slots(bias=jnp.zeros(segment.pos.shape, jnp.float32))
        segment = scorer.observe(with_stats(segment, scorer), seen)
        segment, state = shrink(segment, seen, rows, slots, rule.start(segment.pos.shape[0]))
        return layer.with_tail(segment.take(*keep_highest(segment.pos, segment.pos, slots))), state

    @functools.partial(jax.jit, static_argnames="slots")
    def shrink_in_place(layer: LayerCache, seen: LayerObservation, rows: jax.Array, state, *, slots: int):
        segment, state = shrink(dense_tail(layer, "merge"), seen, rows, slots, state)
        return layer.with_tail(segment), state

    def split(cache: Cache, observation: Observation):
        return split_budget(budget, len(cache.layers), observation, layers, always)

    def init(cache: Cache, observation: Observation):
        each = zip(cache.layers, observation.each_layer(), split(cache, observation), strict=True)
        done = [compress(layer, seen, rows, slots=slots) for layer, seen, (slots, rows) in each]
        return cache.replace(layers=tuple(layer for layer, _ in done)), tuple(state for _, state in done)

    def update(cache: Cache, states: tuple, observation: Observation):
        each = zip(cache.layers, observation.each_layer(), split(cache, observation), states, strict=True)
        done = [
            shrink_in_place(layer, seen, rows, state, slots=slots) for layer, seen, (slots, rows), state in each
        ]
        return cache.replace(layers=tuple(layer for layer, _ in done)), tuple(state for _, state in done)

    return CacheTransform(
        init=init,
        update=update,
        schedule=Schedule(
            needs=scorer.needs,
            observer=observer_of(scorer, "merge"),
            frees_in_prefill=1,
            frees_in_decode=1,
            budget=budget,
            excess=excess_over(budget, layers, always),
            at_least=always,
            name="merge",
            order=Order.of(asks(scorer, "vectors slots room"), "whole aligned"),
        ),
    )


def move(segment: Segment, moves: Moves, *, values_only: bool = False, mean: bool = True) -> Segment:
    """Adds slots to those that take them up, as `merge` says, and empties them.

    Args:
      segment: of S slots.
      moves: which slots go where.
      values_only: keys stay as they are.
      mean: divides by the sum of weights.
    """
    B, K, S = segment.pos.shape
    gone = marked(moves.slots, moves.real, S)
    slots, real = moves.slots, moves.real
    if moves.source is not None:
        slots, real = (jnp.take_along_axis(x, moves.source, axis=-1) for x in (slots, real))
    given = segment.take(slots, real)
    taken_up = real & (moves.into < S)
    taken_up &= ~jnp.take_along_axis(gone, jnp.minimum(moves.into, S - 1), axis=-1)  # what is given up takes up nothing
    weight = jnp.where(taken_up, moves.weight, 0.0)
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    into = jnp.where(taken_up, moves.into, S)
    count = slots.shape[2]
    few = count <= _FEW

    def add(x):
        """Sums of x over what goes to the same slot: for each of a few, otherwise for every slot."""
        if few:
            same = (into[..., None] == into[..., None, :]).astype(jnp.float32)
            return jnp.einsum("bkef,bkf...->bke...", same, x, precision=jax.lax.Precision.HIGHEST)
        return jnp.zeros((B, K, S, *x.shape[3:]), jnp.float32).at[rows, heads, into].add(x, mode="drop")

    # A few tokens change as many slots, in place; many are summed for all slots at once.
    target = segment.take(jnp.minimum(into, S - 1), taken_up) if few else segment
    total = 1.0 + add(weight)[..., None] if mean else 1.0
    joined = lambda own, x: (own.astype(jnp.float32) + add(weight[..., None] * x.astype(jnp.float32))) / total
    if values_only:
        values = joined(target.values_apart("merging values"), given.v)
        merged = target.replace(v=values.astype(segment.v.dtype))
    else:
        merged = target.map_vectors(joined, given).astype(segment.k.dtype)
    if segment.bias is not None:
        tokens = jnp.exp(target.bias) + add(jnp.where(taken_up, jnp.exp(given.bias), 0.0))
        merged = merged.with_slots(bias=jnp.log(tokens))
    if few:
        left = segment.drop(gone)
        for i in range(count):
            new = jax.tree.map(lambda x: x[:, :, i : i + 1], merged)
            left = left.put(jnp.minimum(into, S - 1)[..., i], new)
        return left
    return merged.drop(gone)
