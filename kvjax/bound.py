"""A decoder and a method, bound together: prefill, extend and generate without passing either twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from kvjax import drafts, drivers
from kvjax.cache import Cache
from kvjax.drivers import Generated, Run, Step, StepOutput
from kvjax.observation import Observation
from kvjax.sampling import Greedy, Sampler
from kvjax.speculation import Drafter, Speculated, speculate
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.sliding_windows import respect_windows

EmptyCache = Callable[[int], Cache]
"""`batch -> cache`: one without slots, in the shapes and the dtype of a decoder."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class BoundMethod:
    """Joins a decoder and a method: the result of `bind`.

    It is a pytree of the decoder's arrays: pass it to a jitted function as an argument, and a program is compiled once
    for all weights, such as `jax.jit(BoundMethod.extend)(lm, run, tokens, lengths)`. A function that is jitted around
    it instead holds the weights as constants.

    Attributes:
      step: the decoder.
      transform: the method, which leaves layers with a sliding window to their window.
      empty_cache: makes the cache that a prompt starts from.
      stop_tokens: a row of `generate` ends with any of these.
    """

    step: Step
    transform: CacheTransform
    empty_cache: EmptyCache | None
    stop_tokens: tuple[int, ...]

    def prefill(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        *,
        room: int,
        call_tokens: int = 1,
        chunk: int | None = None,
    ) -> Run:
        """Reads the prompts, compresses the cache and makes room for what follows; see `kvjax.prefill`."""
        make = getattr(self.step, "empty_cache", None) if self.empty_cache is None else self.empty_cache
        how = dict(room=room, call_tokens=call_tokens, chunk=chunk)
        return drivers.prefill(self.step, self.transform, tokens, lengths, make(tokens.shape[0]), **how)

    def start(
        self,
        prompt: StepOutput,
        observation: Observation,
        *,
        room: int,
        call_tokens: int = 1,
        tokens: jax.Array | None = None,
    ) -> Run:
        """Compresses a prompt that the decoder has read; see `kvjax.start`."""
        how = dict(room=room, call_tokens=call_tokens, step=self.step, tokens=tokens)
        return drivers.start(self.transform, prompt, observation, **how)

    def extend(self, run: Run, tokens: jax.Array, lengths: jax.Array) -> tuple[Run, jax.Array]:
        """Feeds given tokens in one call; see `kvjax.extend`."""
        return drivers.extend(self.step, self.transform, run, tokens, lengths)

    def generate(
        self, run: Run, max_new_tokens: int, sampler: Sampler = Greedy(), key: jax.Array | None = None
    ) -> Generated:
        """Draws tokens until every row has stopped; see `kvjax.generate`.

        Args:
          run: the sequence so far.
          max_new_tokens: at most this many for each row.
          sampler: draws a token from logits.
          key: PRNG key; None: `jax.random.key(0)`.
        """
        key = jax.random.key(0) if key is None else key
        how = dict(max_new_tokens=max_new_tokens, sampler=sampler, key=key, stop_tokens=self.stop_tokens)
        return drivers.generate(self.step, self.transform, run, **how)

    def peek(self, run: Run, tokens: jax.Array, lengths: jax.Array | None = None) -> drafts.Draft:
        """Reads given tokens behind a run and writes nothing; see `kvjax.peek`."""
        return drafts.peek(self.step, self.transform, run, tokens, lengths)

    def commit(self, run: Run, draft: drafts.Draft, count: jax.Array) -> Run:
        """Writes the first tokens of a draft; see `kvjax.commit`."""
        return drafts.commit(self.transform, run, draft, count)

    def truncate(self, run: Run, length: jax.Array, logits: jax.Array) -> Run:
        """Takes the newest tokens out again, where that is exact; see `kvjax.truncate`."""
        return drafts.truncate(self.transform, run, length, logits)

    def speculate(
        self,
        run: Run,
        drafter: Drafter,
        state: Any,
        max_new_tokens: int,
        sampler: Sampler = Greedy(),
        key: jax.Array | None = None,
    ) -> Speculated:
        """Draws what `generate` draws, several tokens in a call where guesses are right; see `kvjax.speculate`.

        Args:
          run: the sequence so far.
          drafter: guesses.
          state: `drafter.start` of the text so far.
          max_new_tokens: at most this many for each row.
          sampler: draws a token from logits.
          key: PRNG key; None: `jax.random.key(0)`.
        """
        key = jax.random.key(0) if key is None else key
        how = dict(max_new_tokens=max_new_tokens, sampler=sampler, key=key, stop_tokens=self.stop_tokens)
        return speculate(self.step, self.transform, run, drafter, state, **how)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Returns the arrays of the decoder: a plain function has none (`jax.tree_util.register_pytree_node_class`)."""
        plain = jax.tree_util.all_leaves([self.step])
        static = self.transform, self.empty_cache, self.stop_tokens
        return ((), (self.step, *static)) if plain else ((self.step,), (None, *static))

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], steps: tuple[Any, ...]) -> BoundMethod:
        """See `tree_flatten`."""
        return cls(*(steps or static[:1]), *static[1:])


def bind(
    step: Step,
    method: CacheTransform,
    *,
    empty_cache: EmptyCache | None = None,
    stop_tokens: tuple[int, ...] = (),
) -> BoundMethod:
    """Binds a decoder and a method together.

    Layers with a sliding window are left to it, as `kvjax.respect_windows` says, whatever the method.

    Args:
      step: the decoder.
      method: what compresses.
      empty_cache: makes the cache that a prompt starts from; None: `step.empty_cache`.
      stop_tokens: ids that end a row of `generate`.

    Raises:
      TypeError: method is not a `CacheTransform`.
      ValueError: the decoder does not say what an empty cache of it is, and neither does `empty_cache`.
    """
    if not isinstance(method, CacheTransform):
        raise TypeError(f"method must be a CacheTransform, such as kvjax.methods.snapkv(budget=0.25), got {method!r}.")
    if empty_cache is None and not hasattr(step, "empty_cache"):
        raise ValueError(
            "empty_cache must be given for a decoder without a method of that name: "
            "lambda batch: kvjax.empty_cache(batch=batch, slots=0, ...)."
        )
    return BoundMethod(step, respect_windows(method), empty_cache, tuple(int(token) for token in stop_tokens))
