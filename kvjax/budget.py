"""Token budgets: a count, or a fraction of the prompt."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

_SLACK = 1e-3  # tokens; 0.3 * 10 must be 3 in float32 as it is in decimal


def check_budget(budget: int | float, *, at_least: int = 1, holds: str = "one token") -> None:
    """Checks a budget when a method is built.

    Args:
      budget: tokens per KV head (int), or a fraction of the prompt in (0, 1] (float).
      at_least: the smallest count that makes sense.
      holds: what that smallest count is for, to be named in the error.

    Raises:
      ValueError: names `budget`, what came and what was expected.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"budget must be an int (tokens) or a float (fraction), got {budget!r}.")
    if isinstance(budget, float):
        if not 0.0 < budget <= 1.0:
            raise ValueError(f"budget as a fraction of the prompt must be in (0, 1], got {budget}.")
    elif budget < at_least:
        raise ValueError(f"budget must be at least {at_least} tokens ({holds}), got {budget}.")


def budget_slots(budget: int | float, prompt_slots: int, at_least: int = 1) -> int:
    """Returns the slots per KV head for the longest prompt of a batch: `budget`, or a fraction of the prompt.

    A fraction is rounded down, but never below `at_least`: what a method always keeps does not shrink with the prompt.
    """
    if isinstance(budget, float):
        return max(1, at_least, math.floor(budget * prompt_slots + _SLACK))
    return budget


def budget_rows(budget: int | float, prompt: jax.Array, prompt_slots: int, at_least: int = 1) -> jax.Array:
    """Returns the same for each row: i32[B] tokens to keep, from i32[B] prompt lengths of at most `prompt_slots`."""
    if isinstance(budget, float):
        rows = jnp.maximum(max(1, at_least), jnp.floor(budget * prompt + _SLACK).astype(jnp.int32))
        # From 2 ** 14 tokens on, the product in float32 may round up past the slots there are.
        return jnp.minimum(rows, budget_slots(budget, prompt_slots, at_least))
    return jnp.full_like(prompt, budget)
