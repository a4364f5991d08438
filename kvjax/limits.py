"""What a call of the drivers may bring: ids and positions that the decoder knows, tokens that the cache has room for.

What shapes decide is refused when a call is traced. What only values decide is refused where values can be seen,
outside `jax.jit`; inside it the row in question is left as it was and its logits are NaN (its tokens -1), no other row
notices, and `jax.experimental.checkify` turns it into an error. A row that was refused stays so.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Int32

from kvjax.cache import Cache


class Limits(NamedTuple):
    """What a decoder can read; None: anything."""

    vocab_size: int | None = None  # ids are below it
    positions: int | None = None  # tokens a row may have, prompt and answer together


def check_whole(name: str, value: object, least: int) -> None:
    """Checks a number of tokens.

    Raises:
      TypeError: it is no whole number; ValueError: it is below `least`. Both name it.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number of tokens, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def limits_of(step: Any) -> Limits:
    """Returns the limits that a decoder states; a plain function states none."""
    return getattr(step, "limits", Limits())


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Room:
    """The tokens that a run has slots for: part of the structure of a `Run`, so that calls are checked when traced.

    Attributes:
      prompt_slots: those of the longest prompt of the batch; fractions of it are budgets.
      method: what the transform that made the run calls itself, so that no other goes on with it.
      total: tokens of all calls together; None: any number, the method frees slots as they come.
      call: the most tokens of one call where any number may come; None where `total` bounds it.
      spent: of `total`, what `generate` may have used. What a call brings is counted in the cache alone: its padding
        takes no room, and every step of a loop would be a program of its own.
    """

    prompt_slots: int
    method: str
    total: int | None
    call: int | None = None
    spent: int = 0

    @classmethod
    def reserved(
        cls, prompt_slots: int, method: str, tokens: int, call_tokens: int, interval: int | None
    ) -> tuple[int, Room]:
        """Returns the slots to reserve for `tokens` more tokens, and what they have room for.

        Args:
          prompt_slots: tokens of the longest prompt.
          method: what the transform calls itself.
          tokens: that will follow, over all calls.
          call_tokens: the most tokens that one call brings.
          interval: the method frees slots at least every so many tokens; None: never.
        """
        if interval is None:
            return tokens, cls(prompt_slots, method, total=tokens)
        slots = min(tokens, interval - 1 + call_tokens)
        call = slots - (interval - 1)
        return slots, cls(prompt_slots, method, *((None, call) if call > 0 else (tokens,)))

    def check_method(self, method: str) -> None:
        """Checks that a run goes on with the method that made it.

        Raises:
          ValueError: it is another.
        """
        if method != self.method:
            raise ValueError(f"transform must be the one that made the run, {self.method}, got {method}.")

    def check_call(self, tokens: int) -> None:
        """Checks that there is room for a call of so many tokens.

        Raises:
          ValueError: there is none.
        """
        if self.total is not None:
            self.after(tokens)
        elif tokens > self.call:
            raise ValueError(
                f"tokens of a call must be at most {self.call}, which is what the method has slots for, got {tokens}: "
                f"prefill with call_tokens={tokens} and as much room, or more."
            )

    def after(self, tokens: int) -> Room:
        """Returns what is left when up to so many tokens have followed one by one.

        Raises:
          ValueError: there is no room for them.
        """
        if self.total is None:
            return self
        if self.spent + tokens > self.total:
            used = f", of which {self.spent} are spent" if self.spent else ""
            raise ValueError(
                f"the cache has room for {self.total} tokens after the prompt{used}, got {tokens} more: prefill with "
                f"room={self.spent + tokens} or more."
            )
        return dataclasses.replace(self, spent=self.spent + tokens)


def check_tokens(tokens: Any, lengths: Any, cache: Cache) -> None:
    """Checks kind and shape of what a call of the decoder brings.

    Raises:
      ValueError: names the argument that is wrong.
    """
    integers = lambda x, ndim: (
        hasattr(x, "shape") and hasattr(x, "dtype") and len(x.shape) == ndim and jnp.issubdtype(x.dtype, jnp.integer)
    )
    if not integers(tokens, 2):
        raise ValueError(f"tokens must be an array of integers [B, T], got {_described(tokens)}.")
    B, T = tokens.shape
    if B < 1 or T < 1:
        raise ValueError(f"tokens must be at least 1 row of at least 1 token, got shape {list(tokens.shape)}.")
    if not integers(lengths, 1) or lengths.shape[0] != B:
        raise ValueError(f"lengths must be an array of {B} integers, one for each row, got {_described(lengths)}.")
    if cache.length.shape[0] != B:
        raise ValueError(f"tokens must have the {cache.length.shape[0]} rows of the cache, got {B}.")


def longest_row(lengths: jax.Array, slots: int) -> int:
    """Returns the largest of i32[B] lengths where values can be seen, else the slots there are for them."""
    return int(np.asarray(lengths).max()) if can_be_seen(lengths) else slots


def can_be_seen(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def check_positions(limits: Limits, most: int, what: str) -> None:
    """Checks that rows of `most` tokens fit the decoder.

    Raises:
      ValueError: they do not; `what` says what they are made of.
    """
    if limits.positions is not None and most > limits.positions:
        raise ValueError(f"{what} is more than the {limits.positions} positions of the decoder{_BEYOND}.")


_BEYOND = "; bind(..., max_positions=...) of `models` goes beyond what a model was trained for"


def readable(
    limits: Limits,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    first: Int32[Array, " B"],
    *,
    least: int,
    left: Int32[Array, " B"] | None = None,
) -> jax.Array:
    """Returns bool[B]: the rows that the decoder can read and the cache can hold.

    Args:
      limits: of the decoder.
      tokens: i32[B, T]; what is beyond `lengths` does not matter.
      lengths: i32[B].
      first: i32[B], positions of the first tokens.
      least: the smallest length that makes sense.
      left: i32[B], tokens that the cache has room for; None: any number.

    Raises:
      ValueError: values can be seen and a row is wrong: names the argument, the value and the row.
    """
    given = (tokens, lengths, first, left)
    seen = all(x is None or can_be_seen(x) for x in given)
    xp = np if seen else jnp
    tokens, lengths, first, left = (None if x is None else xp.asarray(x) for x in given)
    T = tokens.shape[1]
    rules = [
        _Rule(f"lengths must be from {least} to the {T} tokens of a row", (lengths >= least) & (lengths <= T), lengths)
    ]
    if limits.vocab_size is not None:
        wrong = ((tokens < 0) | (tokens >= limits.vocab_size)) & (xp.arange(T) < lengths[:, None])
        which = xp.take_along_axis(tokens, xp.argmax(wrong, axis=1)[:, None], axis=1)[:, 0]
        rules.append(_Rule(f"tokens must be ids from 0 to {limits.vocab_size - 1}", ~xp.any(wrong, axis=1), which))
    if limits.positions is not None:
        most, said = first + lengths, f"rows may have {limits.positions} tokens, the decoder's positions"
        rules.append(_Rule(said, most <= limits.positions, most, _BEYOND))
    if left is not None:
        rules.append(_Rule("lengths must fit the room that a row has left", lengths <= left, lengths))
    for rule in rules:
        if not seen:
            checkify.debug_check(jnp.all(rule.right), f"{rule.said}, in row {{row}} are {{value}}", **rule.first())
        elif not rule.right.all():
            row = int(np.argmin(rule.right))
            raise ValueError(f"{rule.said}, got {rule.value[row]} in row {row}{rule.advice}.")
    return jnp.asarray(functools.reduce(operator.and_, (rule.right for rule in rules)))


class _Rule(NamedTuple):
    """What must hold of every row."""

    said: str
    right: Bool[Array, " B"]
    value: Int32[Array, " B"]  # what each row came with
    advice: str = ""

    def first(self) -> dict[str, jax.Array]:
        """The first row of which it does not hold, and its value."""
        row = jnp.argmin(self.right)
        return {"row": row, "value": self.value[row]}


def _described(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return type(x).__name__
