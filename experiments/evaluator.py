"""Runs methods on examples: compresses contexts, feeds questions, scores answers and predictions.

Several examples are read together, one a row. Rows do not depend on each other, so each gets the numbers it would get
alone, to rounding.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments import reading, tasks
from experiments.methods import Method
from models import Model
from models.decoder import bind, prompt_cache
from models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Score:
    """What one method did on one example."""

    nll: float | None
    exact_match: bool | None
    kl: float | None
    prediction: str | None
    score: float | None
    cache_bytes: int
    read_bytes: int
    allocated_bytes: int
    kept_tokens: float
    budgeted_tokens: float  # of the layers that a budget is for: those without a sliding window, if there are any
    prefill_seconds: float
    decode_tokens_per_second: float | None
    log_probs: jax.Array  # f32[answer, V]


@dataclasses.dataclass
class _Clock:
    """Tokens that were decoded one by one, over all rows, and the seconds they took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float | None:
        return self.tokens / self.seconds if self.tokens else None


@dataclasses.dataclass(frozen=True)
class Asked:
    """Examples that are read together, as an evaluation puts them: one row each.

    Attributes:
      examples: a row each.
      prompts: what is read before the cache is compressed.
      questions: what follows.
      slots: that every prompt is padded to.
      room: tokens that may follow.
    """

    examples: Sequence[tasks.Example]
    prompts: Sequence[Sequence[int]]
    questions: Sequence[Sequence[int]]
    slots: int
    room: int


class Evaluator:
    """Runs methods on examples. The dense prefill of examples is shared by the methods that start from it.

    Args:
      model: that answers.
      methods: the full cache first.
      call_tokens: the most tokens of a question that one call of the decoder takes.
      cache_dtype: of uncompressed keys and values; None: the weights'.
      whole: compile each call as one program instead of a layer after the other: for a mesh, where devices that wait
        for each other in several programs at once may do so for ever. Every method then reads prompts by itself.
    """

    jit = staticmethod(jax.jit)  # may be replaced by one that compiles faster

    def __init__(
        self,
        model: Model,
        methods: Sequence[Method],
        call_tokens: int,
        cache_dtype: jnp.dtype | None = None,
        whole: bool = False,
    ):
        self._model = model
        self._full = methods[0]
        self._step_in_place = bind(model.params, model.config, donate=True)
        self._needs = reading.shared_needs(methods)
        self._call_tokens = call_tokens
        self._dtype = jnp.dtype(cache_dtype or model.params.embed.dtype)
        self._whole = whole
        self._compiled: dict[tuple[str, int | None], Callable[..., Any]] = {}
        self._at_rest: dict[tuple[str, int, jnp.dtype], tuple[int, int]] = {}

    def prefill(self, asked: Asked) -> tuple[kvjax.StepOutput | None, float]:
        """Reads prompts with the full cache: what came out, and the seconds it took; None where methods read alone."""
        if self._whole:
            return None, 0.0
        return reading.read(self._model, asked.prompts, self._needs, asked.slots, self._dtype)

    def compress(self, method: Method, dense: kvjax.StepOutput | None, asked: Asked) -> tuple[kvjax.Run, float]:
        """Compresses what `prefill` read, or reads the prompts alone: the run, and the seconds it took."""
        start = time.perf_counter()
        if self._whole or method.reads_alone:
            tokens, lengths = reading.padded(asked.prompts, asked.slots), reading.row_lengths(asked.prompts)
            room = max(asked.room, self._call_tokens)  # inside jit a call is refused by its width
            run = self._prefill_alone(method, room)(self._model.params, tokens, lengths)
        else:
            how = dict(room=asked.room, call_tokens=self._call_tokens, slots=asked.slots)
            run = reading.compress(self._model, method, dense, asked.prompts, **how)
        jax.block_until_ready(run)
        return run, time.perf_counter() - start

    def warm_up(self, method: Method, dense: kvjax.StepOutput | None, asked: Asked) -> None:
        """Compiles what `score` runs, so that what it measures is not the compiler."""
        run, _ = self.compress(method, dense, asked)
        for size in (self._call_tokens, 1):
            nothing = jnp.zeros((len(asked.prompts), size), jnp.int32)
            run, _ = self._extend(method, run, nothing, nothing[:, 0])

    def score(
        self,
        method: Method,
        dense: tuple[kvjax.StepOutput | None, float],
        asked: Asked,
        references: Sequence[jax.Array | None],
    ) -> list[Score]:
        """Compresses, asks and scores, row by row; `references` are the full cache's log-probabilities."""
        examples, rows = asked.examples, range(len(asked.examples))
        run, seconds = self.compress(method, dense[0], asked)
        if not method.reads_alone:
            seconds += dense[1]
        allocated = kvjax.nbytes((run.cache, run.state)) // len(rows)
        at_rest = self.bytes_at_rest(method, asked.slots)
        kept, budgeted = map(np.asarray, self._kept_tokens(run.cache))
        self._check_finite(method, examples, self._logits(run))
        run, _ = self._feed(method, run, asked.questions)
        clock = _Clock()
        log_probs, matches, predictions = self._answers(method, run, examples, clock)
        for each in log_probs:
            self._check_finite(method, examples, each)
        scores = []
        for row, example in enumerate(examples):
            answer = jnp.asarray(example.answer_ids, jnp.int32)
            nll = kl = None
            if len(answer):
                nll = float(-jnp.mean(jnp.take_along_axis(log_probs[row], answer[:, None], axis=1)))
                if references[row] is not None:
                    full = references[row]
                    kl = float(jnp.mean(jnp.sum(jnp.exp(full) * (full - log_probs[row]), axis=-1)))
            scores.append(
                Score(
                    nll=nll,
                    exact_match=matches[row],
                    kl=kl,
                    prediction=predictions[row],
                    score=None if predictions[row] is None else example.score(predictions[row]),
                    cache_bytes=at_rest,
                    read_bytes=self.bytes_read(method, asked.slots),
                    allocated_bytes=allocated,
                    kept_tokens=float(kept[row]),
                    budgeted_tokens=float(budgeted[row]),
                    prefill_seconds=seconds / len(rows),
                    decode_tokens_per_second=clock.speed,
                    log_probs=log_probs[row],
                )
            )
        return scores

    def bytes_at_rest(self, method: Method, slots: int) -> int:
        """Returns the bytes of one compressed context of `slots` tokens, without room for tokens to come.

        Nothing runs: they follow from shapes.

        Raises:
          ValueError: the method refuses such a context, by its name.
        """
        return self._bytes(method, slots, self._dtype)[0]

    def bytes_read(self, method: Method, slots: int) -> int:
        """Returns the bytes of the same context that the attention of a decoding step reads."""
        return self._bytes(method, slots, self._dtype)[1]

    def full_bytes(self, slots: int) -> int:
        """Returns the same of the full cache in 16 bits, which every ratio is to."""
        return self._bytes(self._full, slots, jnp.dtype(jnp.bfloat16))[0]

    def _bytes(self, method: Method, slots: int, dtype: jnp.dtype) -> tuple[int, int]:
        """Counts the bytes that a context takes, and those that a decoding step reads of it."""
        key = method.config, slots, dtype
        if key not in self._at_rest:
            tokens, lengths = jax.ShapeDtypeStruct((1, slots), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
            params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._model.params)
            prefill = lambda *args: self._prefill(method, *args, room=0, dtype=dtype)
            try:
                run = jax.eval_shape(prefill, params, tokens, lengths)
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"method {method.name}, a context of {slots} tokens: {error}") from error
            self._at_rest[key] = kvjax.nbytes((run.cache, run.state)), kvjax.bytes_read(run.cache)
        return self._at_rest[key]

    def _answers(
        self, method: Method, run: kvjax.Run, examples: Sequence[tasks.Example], clock: _Clock
    ) -> tuple[list[jax.Array], list[bool | None], list[str | None]]:
        """Scores each answer token by token, and generates: log-probabilities f32[answer, V], matches, predictions.

        All examples generate, or none does. Where every answer turns out to be what greedy decoding gives, it goes on
        behind it.
        """
        answers = [example.answer_ids for example in examples]
        first = jax.nn.log_softmax(self._logits(run))
        log_probs = [[first[row : row + 1]] if answers[row] else [] for row in range(len(answers))]
        if not examples[0].generates:
            _, logits = self._feed(method, run, [answer[:-1] for answer in answers])
            for row, each in enumerate(logits):
                log_probs[row].append(jax.nn.log_softmax(each))
            log_probs = [self._joined(each) for each in log_probs]
            return log_probs, [None] * len(answers), [None] * len(answers)
        before = self._copy(run) if any(answers) else run
        jax.block_until_ready(before)
        start = time.perf_counter()
        for index in range(max(map(len, answers))):
            tokens = [answer[index : index + 1] for answer in answers]
            run, _ = self._feed(method, run, tokens, 1)
            clock.tokens += sum(map(len, tokens))
            after = jax.nn.log_softmax(self._logits(run))
            for row, answer in enumerate(answers):
                if index + 1 < len(answer):
                    log_probs[row].append(after[row : row + 1])
        jax.block_until_ready(run)
        clock.seconds += time.perf_counter() - start
        log_probs = [self._joined(each) for each in log_probs]
        best = [np.asarray(jnp.argmax(each, axis=-1)).tolist() for each in log_probs]
        right = [bool(answer) and got == list(answer) for got, answer in zip(best, answers)]
        matches = [found if answer else None for found, answer in zip(right, answers)]
        written = [list(answer) if all(right) else [] for answer in answers]
        predictions = self._generate(method, run if all(right) else before, examples, written, clock)
        return log_probs, matches, predictions

    def _generate(
        self,
        method: Method,
        run: kvjax.Run,
        examples: Sequence[tasks.Example],
        written: list[list[int]],
        clock: _Clock,
    ) -> list[str]:
        """Goes on greedily behind what is `written` until every row has stopped, and returns the texts."""
        tokenizer = self._model.tokenizer
        start = time.perf_counter()
        while True:
            going = [not _has_stopped(tokenizer, *row) for row in zip(examples, written)]
            if not any(going):
                break
            best = np.asarray(jnp.argmax(self._logits(run), axis=-1))
            tokens = [[int(token)] if alive else [] for token, alive in zip(best, going)]
            for ids, token in zip(written, tokens):
                ids += token
            left = [not _has_stopped(tokenizer, *row) for row in zip(examples, written)]
            if any(left):
                run, _ = self._feed(method, run, [ids if alive else [] for ids, alive in zip(tokens, left)], 1)
                clock.tokens += sum(left)
        clock.seconds += time.perf_counter() - start
        self._check_finite(method, examples, self._logits(run))
        return [_text(tokenizer, *row) for row in zip(examples, written)]

    def _joined(self, log_probs: Sequence[jax.Array]) -> jax.Array:
        return jnp.concatenate(log_probs) if log_probs else jnp.zeros((0, self._model.config.vocab_size))

    def _budgeted(self, cache: kvjax.Cache) -> kvjax.Cache:
        """The cache of the layers that a method's budget is for."""
        local = set(self._model.config.local_layers)
        others = tuple(layer for i, layer in enumerate(cache.layers) if i not in local)
        return cache.replace(layers=others) if others else cache

    def _check_finite(self, method: Method, examples: Sequence[tasks.Example], logits: jax.Array) -> None:
        if bool(jnp.any(jnp.isnan(logits))):
            whose = f"the weights or activations of {self._model.config.name} are not finite"
            if method.name != "full":
                whose = "the full cache gave numbers, so the method is wrong here"
            named = ", ".join(dict.fromkeys(example.task for example in examples))
            raise ValueError(f"method {method.name}: its predictions for {named} are NaN; {whose}.")

    def _prefill(self, method: Method, params, tokens, lengths, *, room: int, dtype: jnp.dtype) -> kvjax.Run:
        config = self._model.config
        empty = lambda batch: prompt_cache(config, batch, dtype)
        lm = kvjax.bind(bind(params, config), method.transform, empty_cache=empty)
        return lm.prefill(tokens, lengths, room=room, call_tokens=self._call_tokens, chunk=method.prefill_chunk)

    def _prefill_alone(self, method: Method, room: int) -> Callable[..., kvjax.Run]:
        if (method.setting, room) not in self._compiled:
            how = dict(room=room, dtype=self._dtype)
            self._compiled[method.setting, room] = self.jit(lambda *args: self._prefill(method, *args, **how))
        return self._compiled[method.setting, room]

    def _extend(
        self, method: Method, run: kvjax.Run, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[kvjax.Run, jax.Array]:
        """Feeds a call, with the run donated; on a mesh the logits are on the host."""
        if not self._whole:
            return kvjax.bind(self._step_in_place, method.transform).extend(run, tokens, lengths)
        if (method.setting, None) not in self._compiled:
            config = self._model.config
            bound = lambda params: kvjax.bind(bind(params, config), method.transform)
            extend = lambda params, run, *args: bound(params).extend(run, *args)
            self._compiled[method.setting, None] = self.jit(extend, donate_argnums=1)
        run, logits = self._compiled[method.setting, None](self._model.params, run, tokens, lengths)
        return jax.block_until_ready(run), jax.device_get(logits)

    def _logits(self, run: kvjax.Run) -> jax.Array:
        """f32[B, V] of the next token; on a mesh on the host."""
        return jax.device_get(run.logits) if self._whole else run.logits

    def _copy(self, run: kvjax.Run) -> kvjax.Run:
        copy = lambda run: jax.tree.map(jnp.copy, run)
        return jax.block_until_ready(self.jit(copy)(run) if self._whole else copy(run))

    def _kept_tokens(self, cache: kvjax.Cache) -> tuple[jax.Array, jax.Array]:
        """f32[B]: of all layers, and of those that a method's budget is for."""
        kept = lambda cache: (kvjax.kept_tokens(cache), kvjax.kept_tokens(self._budgeted(cache)))
        return jax.block_until_ready(self.jit(kept)(cache)) if self._whole else kept(cache)

    def _feed(
        self, method: Method, run: kvjax.Run, rows: Sequence[Sequence[int]], size: int | None = None
    ) -> tuple[kvjax.Run, list[jax.Array]]:
        """Feeds tokens in calls of a fixed size, and returns f32[tokens, V] for each row, the logits after each."""
        size = size or self._call_tokens
        logits: list[list[jax.Array]] = [[] for _ in rows]
        for start in range(0, max(map(len, rows)), size):
            parts = [list(ids[start : start + size]) for ids in rows]
            tokens = jnp.asarray([part + [0] * (size - len(part)) for part in parts], jnp.int32)
            run, after = self._extend(method, run, tokens, jnp.asarray([len(part) for part in parts]))
            for row, part in enumerate(parts):
                logits[row].append(after[row, : len(part)])
        return run, [self._joined(each) for each in logits]


def _has_stopped(tokenizer: Tokenizer, example: tasks.Example, ids: Sequence[int]) -> bool:
    """Whether a text is as long as it may be, or has come to an end."""
    if len(ids) >= example.new_tokens or ids and ids[-1] in tokenizer.eos_ids:
        return True
    text = tokenizer.decode(ids) if example.stops else ""
    return any(stop in text for stop in example.stops)


def _text(tokenizer: Tokenizer, example: tasks.Example, ids: Sequence[int]) -> str:
    """The text before the first token or string that ends it."""
    ends = [index for index, token in enumerate(ids) if token in tokenizer.eos_ids]
    text = tokenizer.decode(ids[: min([*ends, example.new_tokens])])
    return text[: min([len(text), *(text.find(stop) for stop in example.stops if stop in text)])]
