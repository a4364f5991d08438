"""Token budgets: a count, or a fraction of the prompt."""

from __future__ import annotations

import functools
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp

_SLACK = 1e-3  # tokens; 0.3 * 10 must be 3 in float32 as it is in decimal


class Tokens(int):
    """A count of tokens: `Tokens(1)` is one token. Any other count may be written as an int."""

    __slots__ = ()

    def __new__(cls, count: int) -> Tokens:
        """Makes one of an int.

        Raises:
          ValueError: count is not an int, or negative.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"Tokens must be a whole number of at least 0, got {count!r}.")
        return super().__new__(cls, count)

    def __repr__(self) -> str:
        return f"Tokens({int(self)})"

    __str__ = int.__repr__


class Fraction(float):
    """A part of a whole, in (0, 1]: `Fraction(1)` is all of it. It may be written as a float."""

    __slots__ = ()

    def __new__(cls, part: float) -> Fraction:
        """Makes one of a number.

        Raises:
          ValueError: part is not a number in (0, 1].
        """
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise ValueError(f"Fraction must be in (0, 1], got {part!r}.")
        return super().__new__(cls, part)

    def __repr__(self) -> str:
        return f"Fraction({float(self)})"

    __str__ = float.__repr__


Budget: TypeAlias = Tokens | Fraction | int | float
"""Tokens per KV head: an int counts them, a float is a fraction of each row's prompt.

`1.0`, or `Fraction(1)`, is the whole prompt and `Tokens(1)` one token; the int 1 may be meant as either and is refused.
Where a number is a part of something else (`recent`, of a budget), 1 is one token and 1.0 all of it.
"""


def check_budget(budget: Budget, *, at_least: int = 1, holds: str = "one token") -> None:
    """Checks a budget when a method is built.

    Args:
      budget: tokens per KV head, or a fraction of the prompt in (0, 1].
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
    elif budget == 1 and not isinstance(budget, Tokens):
        raise ValueError("budget must be 1.0 for the whole prompt or kvjax.Tokens(1) for one token, got 1.")
    elif budget < at_least:
        raise ValueError(f"budget must be at least {at_least} tokens ({holds}), got {budget}.")


def budget_slots(budget: Budget, prompt_slots: int, at_least: int = 1) -> int:
    """Returns the slots per KV head for the longest prompt of a batch: `budget`, or a fraction of the prompt.

    A fraction is rounded down, but never below `at_least`: what a method always keeps does not shrink with the prompt.
    """
    if isinstance(budget, float):
        return max(1, at_least, math.floor(budget * prompt_slots + _SLACK))
    return int(budget)


def budget_rows(budget: Budget, prompt: jax.Array, prompt_slots: int, at_least: int = 1) -> jax.Array:
    """Returns the same for each row: i32[B] tokens to keep, from i32[B] prompt lengths of at most `prompt_slots`."""
    if isinstance(budget, float):
        return _parts(prompt, float(budget), max(1, at_least), budget_slots(budget, prompt_slots, at_least))
    return jnp.full_like(prompt, int(budget))


@functools.partial(jax.jit, inline=True)  # one program where a caller runs it outside jit
def _parts(prompt: jax.Array, fraction: float, least: int, most: int) -> jax.Array:
    rows = jnp.maximum(least, jnp.floor(fraction * prompt + _SLACK).astype(jnp.int32))
    return jnp.minimum(rows, most)  # from 2 ** 14 tokens on, the product in float32 may round up past the slots
