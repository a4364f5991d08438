"""Speculative decoding: a drafter guesses, the decoder reads all guesses in one call, and the right ones are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from kvjax.drafts import committed, peek
from kvjax.drivers import Run, Step, tokens_left
from kvjax.limits import Limits, limits_of, readable
from kvjax.sampling import Sampler, row_keys
from kvjax.transforms.base import CacheTransform


State = Any
Draw = Callable[[jax.Array, int | jax.Array], jax.Array]
"""`(logits f32[B, V], ahead) -> i32[B]`: the draw of the token `ahead + 1` places behind the one that is certain.

It is the draw that the decoder itself makes there, with the same key: who draws so from similar logits is accepted more
often than who draws in any other way.
"""


class Drafter(Protocol):
    """Guesses n tokens at a time: a frozen record that may be passed to a jitted function."""

    tokens: int  # n, static

    def start(self, tokens: jax.Array, lengths: jax.Array, *, room: int) -> State:
        """Reads the text so far, i32[B, T] of i32[B] tokens, which up to `room` more will follow."""

    def propose(self, state: State, token: Int32[Array, " B"], draw: Draw) -> tuple[jax.Array, jax.Array]:
        """Guesses what follows the text and one more token.

        Args:
          state: of the text.
          token: i32[B], certain to come next; -1 in a row that has ended.
          draw: see `Draw`.

        Returns:
          i32[B, n] tokens, and i32[B], how many of them each row proposes.
        """

    def keep(
        self, state: State, tokens: Int32[Array, "B 1+n"], count: Int32[Array, " B"], drawn: Int32[Array, "B 1+n"]
    ) -> State:
        """Takes tokens into the text.

        Args:
          state: of the text.
          tokens: i32[B, 1 + n], the certain token and the guesses.
          count: i32[B], how many of them are right.
          drawn: i32[B, 1 + n], what the decoder draws after each of them.
        """


def written(buffer: jax.Array, at: jax.Array, values: jax.Array, count: jax.Array) -> jax.Array:
    """Writes the first i32[B] `count` of `values` [B, n] into `buffer` [B, S], in row b from `at[b]` on.

    What does not fit is left out.
    """
    index = jnp.arange(values.shape[1])
    place = jnp.where(index < count[:, None], at[:, None] + index, buffer.shape[1])
    return buffer.at[jnp.arange(buffer.shape[0])[:, None], place].set(values, mode="drop")


class Speculated(NamedTuple):
    """Tokens drawn by `speculate`."""

    tokens: Int32[Array, "B max_new_tokens"]  # as in `Generated`
    lengths: Int32[Array, " B"]  # tokens before and including the stop token
    run: Run
    drafts: State  # of the drafter, for the next call
    calls: jax.Array  # i32[], of the decoder
    drafted: Int32[Array, " B"]  # guesses that were read
    accepted: Int32[Array, " B"]  # those that were right


def accepted(guesses: Int32[Array, "B n"], lengths: Int32[Array, " B"], drawn: Int32[Array, "B n"]) -> jax.Array:
    """Counts the guesses that the decoder draws itself: i32[B], up to the first that it does not.

    `drawn` are draws from the decoder's own distribution p behind each guess, whatever was guessed, so that what is
    kept, and the draw that follows it, are distributed as p says. A guess d that was made without the draw's key is
    right with probability p(d), as in speculative sampling; one that was drawn from q with the same Gumbel noise with
    at least (1 - t) / (1 + t), where t is the total variation between p and q (at best it is 1 - t).

    Args:
      guesses: i32[B, n].
      lengths: i32[B], guesses of each row.
      drawn: i32[B, n], in the place of each guess.

    Source: Leviathan et al. (2022), arXiv:2211.17192, for greedy draws and certain guesses; Daliri et al., Coupling
    without Communication and Drafter-Invariant Speculative Decoding (2024), arXiv:2408.07978, for the others.
    """
    right = (guesses == drawn) & (jnp.arange(guesses.shape[1]) < lengths[:, None])
    return jnp.sum(jnp.cumprod(right, axis=1), axis=1, dtype=jnp.int32)


def speculate(
    step: Step,
    transform: CacheTransform,
    run: Run,
    drafter: Drafter,
    drafts: State,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    key: jax.Array,
    stop_tokens: tuple[int, ...] = (),
) -> Speculated:
    """Draws the tokens that `generate` draws under the same key, several in a call where guesses are right.

    Every row keeps as many guesses as are right in it. Where no row has any the decoder reads one token.

    The tokens are those of `generate`, up to rounding between one query and several in a call, whoever guesses: if the
    method leaves what follows the prompt as it is. One that acts while decoding (`Schedule.acts_in`), keeps the newest
    tokens in a ring or packs them in blocks does so after every call, here as in `extend`: the queries of a call see
    what the method would have dropped or rounded between them.

    Args:
      step: the decoder.
      transform: what compresses; it acts on accepted tokens alone.
      run: the sequence so far, with room for `max_new_tokens`; where any number may come (`Room.call`), prefilled with
        `call_tokens` of at least `drafter.tokens + 1`.
      drafter: guesses.
      drafts: its state, `drafter.start` of the text so far.
      max_new_tokens: at most this many for each row, at least 0.
      sampler: draws a token from logits.
      key: PRNG key, as in `generate`.
      stop_tokens: a row ends with any of these.

    Raises:
      ValueError: see `generate`; or calls of the run may not bring so many tokens.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}.")
    run.room.check_method(transform.schedule.described)
    n = drafter.tokens
    if run.room.total is None:
        run.room.check_call(n + 1)
    run = run._replace(room=run.room.after(max_new_tokens))
    B, limits = run.logits.shape[0], limits_of(step)
    zeros = jnp.zeros((B,), jnp.int32)
    tokens = jnp.zeros((B, max_new_tokens), jnp.int32)
    if max_new_tokens == 0:
        return Speculated(tokens, zeros, run, drafts, jnp.zeros((), jnp.int32), zeros, zeros)
    count = jnp.full((B,), max_new_tokens)
    readable(Limits(positions=limits.positions), tokens, count, run.cache.length, least=0, left=tokens_left(run))
    stops = jnp.asarray(stop_tokens, jnp.int32)
    keys = row_keys(key, B)
    is_stop = lambda block: jnp.any(block[..., None] == stops, axis=-1)
    fold = jax.vmap(jax.random.fold_in)

    def draw_after(first, logits):
        """i32[B, T]: draws behind every token of a call."""
        T = logits.shape[1]
        place = (first[:, None] + 1 + jnp.arange(T)).reshape(-1)
        each = fold(jnp.repeat(keys, T, axis=0), place)
        return sampler(logits.reshape(B * T, -1), each).reshape(B, T)

    def going(carry):
        return ~jnp.all(carry[0])

    def body(carry):
        done, failed, tokens, lengths, run, drafts, calls, drafted, right = carry
        first = run.cache.length
        token = jnp.where(done, -1, sampler(run.logits, fold(keys, first)))
        alive = token >= 0
        draw = lambda logits, ahead: sampler(logits, fold(keys, first + 1 + ahead))
        guesses, guessed = drafter.propose(drafts, token, draw)
        known = guesses >= 0 if limits.vocab_size is None else (guesses >= 0) & (guesses < limits.vocab_size)
        guessed = jnp.minimum(guessed, jnp.sum(jnp.cumprod(known, axis=1), axis=1))
        guessed = jnp.where(alive, jnp.clip(guessed, 0, max_new_tokens - lengths - 1), 0).astype(jnp.int32)
        block = jnp.concatenate([token[:, None], guesses], axis=1)
        there = alive.astype(jnp.int32)

        def read(tokens, count):
            draft = peek(step, transform, run, tokens, count)
            drawn = draw_after(first, draft.logits)
            return draft.padded(n + 1), jnp.pad(drawn, ((0, 0), (0, n + 1 - drawn.shape[1])))

        draft, drawn = jax.lax.cond(
            jnp.any(guessed > 0),
            lambda: read(block, there + guessed),
            lambda: read(block[:, :1], there),
        )
        same = accepted(guesses, guessed, drawn[:, :-1])
        count = jnp.where(alive, 1 + same, 0)
        ends = is_stop(block) & (jnp.arange(n + 1) < count[:, None])
        ended = jnp.any(ends, axis=1)
        count = jnp.where(ended, jnp.argmax(ends, axis=1) + 1, count).astype(jnp.int32)
        run = committed(transform, run, draft, count)
        tokens = written(tokens, lengths, block, count)
        drafts = drafter.keep(drafts, block, count, drawn)
        lengths = lengths + count
        failed = failed | (~done & ~alive)
        done = done | ~alive | ended | (lengths >= max_new_tokens)
        counted = drafted + guessed, right + jnp.maximum(count - 1, 0)
        return done, failed, tokens, lengths, run, drafts, calls + 1, *counted

    never = jnp.zeros((B,), bool)
    start = (never, never, tokens, zeros, run, drafts, jnp.zeros((), jnp.int32), zeros, zeros)
    _, failed, tokens, lengths, run, drafts, calls, drafted, right = jax.lax.while_loop(going, body, start)
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    last = jnp.where(failed[:, None], -1, last)
    tokens = jnp.where(jnp.arange(max_new_tokens) < lengths[:, None], tokens, last)
    return Speculated(tokens, lengths, run, drafts, calls, drafted, right)
