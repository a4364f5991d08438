"""Who guesses the tokens that come next: earlier text, a smaller decoder, or the decoder's own last guess."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from kvjax.bound import BoundMethod
from kvjax.drivers import Run, extend
from kvjax.speculation import Draw, written


def _check_tokens(tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1 a draft, got {tokens}.")


class Text(NamedTuple):
    """Rows of text that grow."""

    tokens: Int32[Array, "B S"]
    length: Int32[Array, " B"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NGram:
    """Looks the last tokens up in the text so far, and proposes what followed them there.

    Of all earlier places the one with most tokens in common, up to `longest`, and of those the latest. Where the text
    ends before n tokens it goes on from that place again: a period is continued. A row whose last `shortest` tokens
    were nowhere before proposes nothing.

    Attributes:
      tokens: guesses at a time.
      longest: tokens that are compared.
      shortest: tokens that must be the same.

    Source: Saxena, Prompt lookup decoding (2023); Yang et al., Inference with Reference (2023), arXiv:2304.04487.
    """

    tokens: int = 7
    longest: int = 4
    shortest: int = 2

    def __post_init__(self):
        _check_tokens(self.tokens)
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"shortest must be from 1 to longest={self.longest}, got {self.shortest}.")

    def start(self, tokens: jax.Array, lengths: jax.Array, *, room: int) -> Text:
        """See `Drafter`."""
        return Text(jnp.pad(jnp.asarray(tokens, jnp.int32), ((0, 0), (0, room))), jnp.asarray(lengths, jnp.int32))

    def propose(self, state: Text, token: jax.Array, draw: Draw) -> tuple[jax.Array, jax.Array]:
        """See `Drafter`."""
        one = jnp.ones_like(state.length)
        text = written(state.tokens, state.length, token[:, None], one)
        S, last = text.shape[1], state.length  # the certain token lies at `last`
        place = jnp.arange(S)
        common, alike = 0, True
        for back in range(self.longest):
            tail = jnp.take_along_axis(text, jnp.maximum(last - back, 0)[:, None], axis=1)
            here = jnp.roll(text, back, axis=1) == tail
            alike = alike & here & (place >= back) & (last >= back)[:, None]
            common = common + alike
        common = jnp.where(place < last[:, None], common, 0)
        best = jnp.argmax(common * S + place * (common > 0), axis=1)  # most in common, then latest
        found = jnp.take_along_axis(common, best[:, None], axis=1)[:, 0] >= self.shortest
        period = jnp.maximum(last - best, 1)[:, None]
        follows = best[:, None] + 1 + jnp.arange(self.tokens) % period
        guess = jnp.take_along_axis(text, jnp.minimum(follows, S - 1), axis=1)
        return guess, jnp.where(found & (last < S), self.tokens, 0)

    def keep(self, state: Text, tokens: jax.Array, count: jax.Array, drawn: jax.Array) -> Text:
        """See `Drafter`."""
        return Text(written(state.tokens, state.length, tokens, count), state.length + count)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Jacobi:
    """Proposes what the decoder itself drew behind its last, partly wrong guess: a fixed point is the text.

    The first guess is the certain token, again and again.

    Attributes:
      tokens: guesses at a time.

    Source: Santilli et al., Accelerating Transformer Inference for Translation via Parallel Decoding (2023),
    arXiv:2305.10427, in the form that moves on by what was right.
    """

    tokens: int = 7

    def __post_init__(self):
        _check_tokens(self.tokens)

    def start(self, tokens: jax.Array, lengths: jax.Array, *, room: int) -> jax.Array:
        """See `Drafter`."""
        return jnp.full((tokens.shape[0], self.tokens), -1, jnp.int32)

    def propose(self, state: jax.Array, token: jax.Array, draw: Draw) -> tuple[jax.Array, jax.Array]:
        """See `Drafter`."""
        guess = jnp.where(state < 0, token[:, None], state)
        return guess, jnp.full(token.shape, self.tokens, jnp.int32)

    def keep(self, state: jax.Array, tokens: jax.Array, count: jax.Array, drawn: jax.Array) -> jax.Array:
        """See `Drafter`: of what was drawn, the first behind the right tokens is the next certain one."""
        place = count[:, None] + jnp.arange(self.tokens)
        moved = jnp.take_along_axis(drawn, jnp.minimum(place, self.tokens), axis=1)
        moved = jnp.where(place <= self.tokens, moved, -1)
        return jnp.where(count[:, None] > 0, moved, state)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lm"], meta_fields=["tokens"])
@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel:
    """Lets another decoder write on, with a method of its own: a smaller one, or the same over a smaller cache.

    Guesses are written into a copy of its cache, and what was accepted into the cache: exact for every method.

    Attributes:
      lm: the decoder and its method (`kvjax.bind`), of the same vocabulary.
      tokens: guesses at a time.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2022), arXiv:2211.17192; over a
    smaller cache of the same weights: Sun et al., TriForce (2024), arXiv:2404.11912.
    """

    lm: BoundMethod
    tokens: int = 4

    def __post_init__(self):
        _check_tokens(self.tokens)

    def start(self, tokens: jax.Array, lengths: jax.Array, *, room: int) -> Run:
        """See `Drafter`."""
        return self.lm.prefill(tokens, lengths, room=room + self.tokens + 1, call_tokens=self.tokens + 1)

    def propose(self, state: Run, token: jax.Array, draw: Draw) -> tuple[jax.Array, jax.Array]:
        """See `Drafter`."""

        def write(carry, ahead):
            run, token = carry
            run, _ = self._extended(run, token[:, None], (token >= 0).astype(jnp.int32))
            token = draw(run.logits, ahead)
            return (run, token), token

        _, guesses = jax.lax.scan(write, (state, token), jnp.arange(self.tokens))
        guesses = guesses.T
        return guesses, jnp.sum(jnp.cumprod(guesses >= 0, axis=1), axis=1, dtype=jnp.int32)

    def keep(self, state: Run, tokens: jax.Array, count: jax.Array, drawn: jax.Array) -> Run:
        """See `Drafter`."""
        return self._extended(state, tokens, count)[0]

    def _extended(self, run: Run, tokens: jax.Array, lengths: jax.Array) -> tuple[Run, jax.Array]:
        return extend(self.lm.step, self.lm.transform, run, tokens, lengths)
