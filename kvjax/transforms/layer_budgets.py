"""How many slots each layer gets of a budget that all layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.budget import Budget, budget_rows, budget_slots
from kvjax.cache import Cache
from kvjax.observation import Observation

_SLACK = 1e-3  # tokens; equal shares are equal whatever float32 makes of them

LayerBudgets = Callable[[int, jax.Array, jax.Array], Sequence[jax.Array]]
"""`(layers, i32[B] tokens per layer, i32[B] tokens of the prompt) -> i32[B] tokens of each layer`.

All beside what is always kept. A row's split depends on that row alone; it is a function of arrays of any shape.
"""


def pyramid(beta: float = 20, group: int = 1) -> LayerBudgets:
    """Budgets that fall linearly with depth, from about `2 n` to `n / beta`, whose mean is n.

    With n slots a layer: `low = floor(n / beta)`, `high = 2 n - low`, and on the line from `high` in the first layer to
    `low` in the last. A prompt of fewer than `high` tokens caps `high` and raises `low`; one of fewer than `2 n` is
    split evenly. Counts are rounded so that their sum is `L n`; those of groups are rounded down.

    Args:
      beta: how steep; at least 1.
      group: layers in a row that get the same; the line then goes from the first group to the last.

    Source: Cai et al., PyramidKV (2024), section 3.2; KVCache-Factory, `pyramidkv_utils.py`, whose step from layer to
    layer is rounded down, so that it keeps more than its budget; `group` is of Zuo et al., WindowKV (2025).
    """
    if beta < 1:
        raise ValueError(f"beta must be at least 1, got {beta}.")
    if group < 1:
        raise ValueError(f"group must be at least 1 layer, got {group}.")

    def split(layers: int, slots: jax.Array, prompt: jax.Array) -> tuple[jax.Array, ...]:
        groups = -(-layers // group)
        line = np.array([1 - 2 * (layer // group) / max(groups - 1, 1) for layer in range(layers)])
        line = line - line.mean()  # the last group may be smaller
        low = jnp.floor(slots / beta + _SLACK).astype(jnp.int32)
        slope = jnp.minimum(2 * slots - low, prompt) - slots  # what the first layer of even groups has above the mean
        shares = [slots + slope * float(x) for x in line]
        if group == 1:
            counts = _rounded(shares, layers * slots, prompt)
        else:
            counts = [jnp.clip(jnp.floor(share + _SLACK).astype(jnp.int32), 0, prompt) for share in shares]
        evenly = (prompt < 2 * slots) | (groups == 1)
        return tuple(jnp.where(evenly, slots, count) for count in counts)

    return split


def by_variance(variance: Sequence[float], least: float = 0.01) -> LayerBudgets:
    """Budgets that fall where attention is concentrated: `n_l = softmax(-f)_l * L * n`, within bounds.

    Args:
      variance: f of every layer, as `kvjax.calibration.attention_variance` measures it.
      least: of the prompt, that every layer gets; the most is the whole prompt.

    Source: Wan et al., D2O (2024), section 3.2 and its official code.
    """
    share = np.exp(-np.asarray(variance, np.float64))
    weights = share / share.mean()

    def split(layers: int, slots: jax.Array, prompt: jax.Array) -> tuple[jax.Array, ...]:
        if len(weights) != layers:
            raise ValueError(f"variance is of {len(weights)} layers, but the cache has {layers}.")
        whole = lambda x: jnp.floor(x + _SLACK).astype(jnp.int32)
        within = lambda n: jnp.clip(whole(n * slots), whole(least * prompt), prompt)
        return tuple(jnp.where(prompt <= slots, slots, within(float(n))) for n in weights)

    return split


def by_coverage(coverage: Sequence[Sequence[float]]) -> LayerBudgets:
    """Budgets with which every layer holds the same share of its attention, the sum being that of even budgets.

    Layer l needs a fraction `f_l(p)` of the prompt's tokens to hold a share p of the attention they received. With n
    slots a layer of a prompt of T tokens, p is such that `mean_l f_l(p) = n / T`, and `n_l = f_l(p) T`, rounded so that
    the sum over layers is `L n`.

    Args:
      coverage: for each layer the share p that the i-th fraction `i / (len - 1)` of tokens holds, those that received
        most first; from 0 to 1, as `kvjax.calibration.attention_coverage` measures it.

    Source: Wang et al., PrefixKV (2024), arXiv:2412.03409, section 3.
    """
    curves = np.maximum.accumulate(np.asarray(coverage, np.float64), axis=1)
    if curves.ndim != 2 or curves.shape[1] < 2:
        raise ValueError(f"coverage must be a curve of at least two points for each layer, got {list(curves.shape)}.")
    fractions = np.linspace(0, 1, curves.shape[1])
    share = np.linspace(0, 1, 1025)
    needed = np.stack([np.interp(share, curve / curve[-1], fractions) for curve in curves])  # f_l(p)
    needed[:, 0] = 0.0

    def split(layers: int, slots: jax.Array, prompt: jax.Array) -> tuple[jax.Array, ...]:
        if len(curves) != layers:
            raise ValueError(f"coverage is of {len(curves)} layers, but the cache has {layers}.")
        mean, prompt_or_one = jnp.asarray(needed.mean(axis=0), jnp.float32), jnp.maximum(prompt, 1)
        place = jnp.interp(jnp.minimum(slots / prompt_or_one, 1.0), mean, jnp.asarray(share, jnp.float32))
        each = [jnp.interp(place, share, of_layer) * prompt for of_layer in needed.astype(np.float32)]
        return tuple(jnp.where(prompt <= slots, slots, n) for n in _rounded(each, layers * slots, prompt))

    return split


def _rounded(shares: Sequence[jax.Array], total: jax.Array, most: jax.Array) -> list[jax.Array]:
    """Rounds shares so that they add up to a total: each is what its layer adds to the rounded sum, at most `most`."""
    before, sums, counts = 0, 0.0, []
    for index, share in enumerate(shares):
        sums = sums + share
        upto = total if index + 1 == len(shares) else jnp.floor(sums + _SLACK).astype(jnp.int32)
        counts.append(jnp.clip(upto - before, 0, most))
        before = upto
    return counts


def whole_layers(whole: Sequence[int], others: LayerBudgets | None = None) -> LayerBudgets:
    """Lets some layers keep as many tokens as the prompt has, on top of the budget.

    Args:
      whole: their indices; negative ones count from the last layer.
      others: splits the budget over all layers, of which the others get their part; None: evenly.
    """

    def split(layers: int, slots: jax.Array, prompt: jax.Array) -> tuple[jax.Array, ...]:
        if any(not -layers <= index < layers for index in whole):
            raise ValueError(f"whole must name layers of the {layers} there are, got {tuple(whole)}.")
        budgets = list(others(layers, slots, prompt) if others else (slots,) * layers)
        for index in whole:
            budgets[index] = jnp.maximum(slots, prompt)
        return tuple(budgets)

    return split


def split_budget(
    budget: Budget, count: int, observation: Observation, layers: LayerBudgets | None, always: int
) -> list[tuple[int, jax.Array]]:
    """For each of `count` layers its slots, and i32[B], the budget of each row.

    The slots of a layer are those of the prompt that needs most of them, of all lengths that the batch has room for:
    what a row keeps does not depend on the others.

    Args:
      budget: tokens per KV head on average, as a count or as a fraction of each row's prompt.
      count: [L].
      observation: knows the prompts.
      layers: splits what is not always kept; None: evenly.
      always: tokens of every layer that are always kept.
    """
    prompt_slots = observation.prompt_slots

    def of(prompt: jax.Array) -> list[jax.Array]:
        rows = budget_rows(budget, prompt, prompt_slots, always)
        if layers is None:
            return [rows] * count
        each = layers(count, jnp.maximum(rows - always, 0), jnp.maximum(prompt - always, 0))
        return [jnp.broadcast_to(n, prompt.shape).astype(jnp.int32) + always for n in each]

    if layers is None:
        slots = [budget_slots(budget, prompt_slots, always)] * count
    else:
        with jax.ensure_compile_time_eval():
            slots = [int(jnp.max(n)) for n in of(jnp.arange(1, max(prompt_slots, 1) + 1))]
    return [(observation.slots_of(n), jnp.minimum(rows, n)) for n, rows in zip(slots, of(observation.prompt))]


def excess_over(budget: Budget, layers: LayerBudgets | None, always: int):
    """Returns `Schedule.excess` of a transform whose dense tails hold what `split_budget` gives each layer."""

    def excess(cache: Cache, observation: Observation) -> jax.Array:
        each = split_budget(budget, len(cache.layers), observation, layers, always)
        held = (jnp.max(jnp.sum(layer.segments[-1].pos >= 0, axis=-1), axis=-1) for layer in cache.layers)
        return jnp.max(jnp.stack([n - rows for n, (_, rows) in zip(held, each, strict=True)]), axis=0)

    return excess
