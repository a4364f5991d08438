"""How many slots each layer gets of a budget that all layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.budget import budget_rows, budget_slots
from kvjax.observation import Observation

LayerBudgets = Callable[[int, int, int], tuple[int, ...]]
"""`(layers, slots per layer, slots of the prompt) -> slots of each layer`, all beside what is always kept."""


def pyramid(beta: int = 20) -> LayerBudgets:
    """Budgets that fall linearly with depth, from about `2 n` to `n / beta`.

    With n slots a layer: `low = n // beta`, `high = 2 n - low`, `n_l = high - l * ((high - low) // (L - 1))`. A
    prompt of fewer than `high` tokens caps `high` and raises `low`; one of fewer than `2 n` is split evenly.

    Args:
      beta: how steep; at least 1.

    Source: Cai et al., PyramidKV (2024), section 3.2; KVCache-Factory, `pyramidkv_utils.py`.
    """
    if beta < 1:
        raise ValueError(f"beta must be at least 1, got {beta}.")

    def split(layers: int, slots: int, prompt: int) -> tuple[int, ...]:
        if layers == 1 or prompt < 2 * slots:
            return (slots,) * layers
        low = slots // beta
        high = min(2 * slots - low, prompt)
        low = 2 * slots - high
        step = (high - low) // (layers - 1)
        return tuple(high - layer * step for layer in range(layers))

    return split


def by_variance(variance: Sequence[float], least: float = 0.01) -> LayerBudgets:
    """Budgets that fall where attention is concentrated: `n_l = softmax(-f)_l * L * n`, within bounds.

    Args:
      variance: f of every layer, as `kvjax.calibration.attention_variance` measures it.
      least: of the prompt, that every layer gets; the most is the whole prompt.

    Source: Wan et al., D2O (2024), section 3.2 and its official code.
    """
    share = np.exp(-np.asarray(variance, np.float64))
    share = share / share.sum()

    def split(layers: int, slots: int, prompt: int) -> tuple[int, ...]:
        if len(share) != layers:
            raise ValueError(f"variance is of {len(share)} layers, but the cache has {layers}.")
        if prompt <= slots:
            return (slots,) * layers
        return tuple(int(n) for n in np.clip(share * layers * slots, least * prompt, prompt))

    return split


def whole_layers(whole: Sequence[int], others: LayerBudgets | None = None) -> LayerBudgets:
    """Lets some layers keep as many tokens as the prompt has, on top of the budget.

    Args:
      whole: their indices; negative ones count from the last layer.
      others: splits the budget over all layers, of which the others get their part; None: evenly.
    """

    def split(layers: int, slots: int, prompt: int) -> tuple[int, ...]:
        if any(not -layers <= index < layers for index in whole):
            raise ValueError(f"whole must name layers of the {layers} there are, got {tuple(whole)}.")
        budgets = list(others(layers, slots, prompt) if others else (slots,) * layers)
        for index in whole:
            budgets[index] = max(slots, prompt)
        return tuple(budgets)

    return split


def split_budget(
    budget: int | float, count: int, observation: Observation, layers: LayerBudgets | None, protected: int
) -> list[tuple[int, jax.Array]]:
    """For each of `count` layers its slots, and i32[B], the budget of each row.

    The split is that of the longest prompt of the batch; shorter rows take their share of it. In a layer that
    can hold the whole of it, they keep everything as well.

    Args:
      budget: tokens per KV head on average, as a count or as a fraction of each row's prompt.
      count: [L].
      observation: knows the prompts.
      layers: splits what is not protected; None: evenly.
      protected: slots of every layer that are always kept.
    """
    prompt_slots = observation.prompt_slots
    slots = budget_slots(budget, prompt_slots)
    rows = budget_rows(budget, observation.prompt, prompt_slots)
    if layers is None:
        return [(slots, rows)] * count
    free, prompt = slots - protected, max(prompt_slots - protected, 0)

    def of_rows(n: int) -> jax.Array:
        if n >= prompt:
            return jnp.full_like(rows, n + protected)
        share = jnp.floor((rows - protected) * (n / max(free, 1)) + 1e-3).astype(jnp.int32)
        return protected + jnp.clip(share, 0, n)

    return [(n + protected, of_rows(n)) for n in layers(count, free, prompt)]
