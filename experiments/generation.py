"""Text written from compressed caches, with or without drafts, and what that took."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import kvjax
from experiments import reading
from experiments.methods import Method
from models import Model
from models.conversation import padded_length
from models.decoder import prompt_cache

PIECE = 8
"""Tokens that are written before they are shown, where text is shown as it comes."""


@dataclasses.dataclass(frozen=True)
class How:
    """How text is written.

    Attributes:
      max_new_tokens: the most tokens of each text.
      sampler: draws them.
      seed: of the draws.
      piece: tokens of one program; None: all in one.
    """

    max_new_tokens: int
    sampler: kvjax.sampling.Sampler = kvjax.Greedy()
    seed: int = 0
    piece: int | None = None

    @property
    def size(self) -> int:
        """Tokens of one program."""
        return min(self.piece or self.max_new_tokens, self.max_new_tokens)

    @property
    def room(self) -> int:
        """Tokens that the programs may write together."""
        return -(-self.max_new_tokens // self.size) * self.size


@dataclasses.dataclass(frozen=True)
class Written:
    """Holds the texts that one method wrote behind a batch of prompts.

    Attributes:
      ids: tokens of each text, without the stop token.
      prompt_tokens: of all prompts.
      tokens: that were drawn, stop tokens and what the last piece has too many included.
      prefill_seconds: reading and compressing the prompts.
      decode_seconds: writing, drafts included.
      cache_bytes: all arrays of the cache, room for the text included.
      full_bytes: the same of a full cache in 16 bits.
      kept: tokens that a KV head holds of the prompts, on average.
      calls: of the decoder.
      drafted: guesses.
      accepted: those that were right.
    """

    ids: list[list[int]]
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    full_bytes: int
    kept: float
    calls: int
    drafted: int
    accepted: int


class Writer:
    """Writes with one method: a program that reads prompts, and one that writes a piece, each compiled once a shape.

    Args:
      model: the decoder.
      method: what compresses.
      how: see `How`.
      drafter: guesses; None: every token is a call.
    """

    def __init__(self, model: Model, method: Method, how: How, drafter: kvjax.Drafter | None = None):
        self._model, self._method, self._how, self._drafter = model, method, how, drafter
        self._lm = kvjax.bind(model.step, method.transform, stop_tokens=tuple(model.tokenizer.eos_ids))
        call_tokens = 1 if drafter is None else drafter.tokens + 1
        self._room = max(how.room, call_tokens)
        room = dict(room=self._room, call_tokens=call_tokens, chunk=method.prefill_chunk)
        self._read = _Compiled(lambda lm, tokens, lengths: lm.prefill(tokens, lengths, **room))
        self._start = _Compiled(lambda drafter, tokens, lengths: drafter.start(tokens, lengths, room=self._room))
        self._draw = _Compiled(self._drawn, donate=1)
        self._full = kvjax.bind(model.step, kvjax.methods.full(), empty_cache=self._half_precision)

    def write(self, prompts: Sequence[Sequence[int]], show: Callable[[list[int]], None] | None = None) -> Written:
        """Writes behind a batch of prompts.

        Args:
          prompts: token ids, one list a row.
          show: gets the tokens of the first row so far after every piece; None: nobody does.

        Raises:
          ValueError: a prompt is empty, or with its text longer than the model has positions for.
        """
        how, config = self._how, self._model.config
        longest, positions = max(map(len, prompts)), self._model.step.limits.positions
        if positions is not None and longest + self._room > positions:
            raise ValueError(
                f"a prompt of {longest} tokens with {self._room} new ones is more than the {positions} positions of "
                f"{config.name}: lower --max_new_tokens."
            )
        slots = padded_length(longest)
        slots = slots if positions is None else min(slots, positions - self._room)
        tokens, lengths = reading.padded(prompts, slots), reading.row_lengths(prompts)
        full = jax.eval_shape(lambda lm, *of: lm.prefill(*of, room=self._room), self._full, tokens, lengths)
        key = jax.random.key(how.seed)
        self._read.compile(self._lm, tokens, lengths)
        prefill, run = _timed(lambda: self._read(self._lm, tokens, lengths))
        size = kvjax.nbytes((run.cache, run.state))
        kept = float(jnp.mean(kvjax.kept_tokens(run.cache)))
        decode, state = 0.0, ()
        if self._drafter is not None:
            self._start.compile(self._drafter, tokens, lengths)
            decode, state = _timed(lambda: self._start(self._drafter, tokens, lengths))
        B = len(prompts)
        rows, counts = [[] for _ in range(B)], jnp.zeros(3, jnp.int32)
        self._draw.compile(self._lm, (run, state), self._drafter, key)
        for _ in range(how.room // how.size):
            took, ((run, state), tokens, lengths, new) = _timed(
                lambda: self._draw(self._lm, (run, state), self._drafter, key)
            )
            decode, counts = decode + took, counts + new
            for row, drawn, length in zip(rows, tokens.tolist(), lengths.tolist()):
                row.extend(drawn[:length])
            if min(map(min, tokens.tolist())) < 0:
                raise ValueError(f"{config.name} predicts NaN: its weights or activations are not finite.")
            ended = all(set(row) & set(self._lm.stop_tokens) for row in rows)
            if show is not None:
                show(self._text(rows[0]))
            if ended:
                break
        calls, drafted, accepted = counts.tolist()
        return Written(
            ids=[self._text(row) for row in rows],
            prompt_tokens=sum(map(len, prompts)),
            tokens=sum(map(len, rows)),
            prefill_seconds=prefill,
            decode_seconds=decode,
            cache_bytes=size,
            full_bytes=kvjax.nbytes(full.cache),
            kept=kept,
            calls=calls,
            drafted=drafted,
            accepted=accepted,
        )

    def _drawn(self, lm: kvjax.BoundMethod, carry: tuple[kvjax.Run, Any], drafter: Any, key: jax.Array):
        """One piece: what goes on, tokens, lengths, and i32[3] calls, guesses and those that were right."""
        run, state = carry
        room = run.room  # checked for all pieces; what one of them spends would be another program for the next
        size, sampler = self._how.size, self._how.sampler
        if drafter is None:
            out = lm.generate(run, size, sampler, key)
            counts = jnp.stack([jnp.max(out.lengths), 0, 0])
            return (out.run._replace(room=room), state), out.tokens, out.lengths, counts
        out = lm.speculate(run, drafter, state, size, sampler, key)
        counts = jnp.stack([out.calls, jnp.sum(out.drafted), jnp.sum(out.accepted)])
        return (out.run._replace(room=room), out.drafts), out.tokens, out.lengths, counts

    def _text(self, ids: list[int]) -> list[int]:
        """The tokens before the stop token."""
        ids = ids[: self._how.max_new_tokens]
        stops = [index for index, token in enumerate(ids) if token in self._lm.stop_tokens]
        return ids[: stops[0]] if stops else ids

    def _half_precision(self, batch: int) -> kvjax.Cache:
        return prompt_cache(self._model.config, batch, jnp.bfloat16)


class _Compiled:
    """A function of arrays, compiled before it is timed."""

    def __init__(self, function: Callable, donate: int | None = None):
        self._jitted = jax.jit(function, donate_argnums=() if donate is None else donate)
        self._programs: dict[Any, Any] = {}

    def compile(self, *args) -> None:
        """Compiles for these shapes, unless that was done."""
        if (key := self._key(args)) not in self._programs:
            self._programs[key] = self._jitted.lower(*args).compile()

    def __call__(self, *args):
        return self._programs[self._key(args)](*args)

    @staticmethod
    def _key(args) -> Any:
        leaves, tree = jax.tree.flatten(args[1:])  # the first are the weights, the same at every call
        return tree, tuple((x.shape, str(x.dtype)) for x in leaves)


def read_prompts(path: str) -> list[str]:
    """Reads prompts from a file: one a line, or the field `prompt` of every line of a .jsonl file.

    Raises:
      ValueError: names the line; or there is none.
      OSError: the file cannot be read.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts: {path}: got bytes that are not UTF-8 ({error.reason}).") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.endswith(".jsonl"):
            try:
                prompt = json.loads(line)["prompt"]
            except (json.JSONDecodeError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f'--prompts: {path}, line {number}: expected {{"prompt": "some text"}}.')
            line = prompt
        found.append(line)
    if not found:
        raise ValueError(f"--prompts: {path} has no prompts.")
    return found


def batches(prompts: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yields the prompts in order, so many at once."""
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result
