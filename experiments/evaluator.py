"""Runs methods on examples: compresses a context, feeds the question, scores the answer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import kvjax
from experiments import reading, tasks
from experiments.methods import Method
from models import Model
from models.decoder import bind


@dataclasses.dataclass(frozen=True)
class Score:
    """What one method did on one example."""

    nll: float | None
    exact_match: bool | None
    kl: float | None
    cache_bytes: int
    kept_tokens: float
    budgeted_tokens: float  # of the layers that a budget is for: those without a sliding window, if there are any
    prefill_seconds: float
    decode_tokens_per_second: float | None
    log_probs: jax.Array  # f32[answer, V]


class Evaluator:
    """Runs methods on examples. The dense prefill of an example is shared by the methods that start from it."""

    def __init__(self, model: Model, methods: Sequence[Method], room: int, call_tokens: int):
        self._model = model
        self._step_in_place = bind(model.params, model.config, donate=True)
        self._needs = reading.shared_needs(methods)
        self._room, self._call_tokens = room, call_tokens
        self._alone = {}

    def prefill(self, ids: Sequence[int], slots: int | None = None) -> tuple[kvjax.StepOutput, float]:
        """Reads a prompt, padded to `slots`, with the full cache: what came out, and the seconds it took."""
        return reading.read(self._model, ids, self._needs, slots)

    def compress(
        self, method: Method, dense: kvjax.StepOutput, ids: Sequence[int], slots: int | None = None
    ) -> tuple[kvjax.Run, float]:
        """Compresses what `prefill` read, or reads the prompt alone: the run, and the seconds it took."""
        start = time.perf_counter()
        if method.reads_alone:
            run = self._prefill_alone(method)(
                self._model.params, reading.padded(ids, slots), jnp.asarray([len(ids)])
            )
        else:
            room = dict(room=self._room, call_tokens=self._call_tokens, slots=slots)
            run = reading.compress(self._model, method, dense, ids, **room)
        jax.block_until_ready(run)
        return run, time.perf_counter() - start

    def answer(
        self, method: Method, run: kvjax.Run, question: Sequence[int], example: tasks.Example
    ) -> tuple[jax.Array, float | None]:
        """Feeds the question and the answer: f32[answer, V] log-probabilities, and tokens per second."""
        run, _ = self._feed(method, run, question)
        log_probs = [jax.nn.log_softmax(run.logits)]
        answer = example.answer_ids
        if not answer:
            return jnp.zeros((0, run.logits.shape[-1])), None
        if not example.scored:
            _, logits = self._feed(method, run, answer[:-1])
            return jnp.concatenate([*log_probs, *map(jax.nn.log_softmax, logits)]), None
        jax.block_until_ready(run)
        start = time.perf_counter()
        for token in answer[:-1]:
            run, _ = self._feed(method, run, (token,), calls_of=1)
            log_probs.append(jax.nn.log_softmax(run.logits))
        jax.block_until_ready(log_probs)
        seconds = time.perf_counter() - start
        speed = (len(answer) - 1) / seconds if len(answer) > 1 else None
        return jnp.concatenate(log_probs), speed

    def score(
        self,
        method: Method,
        example: tasks.Example,
        dense: tuple[kvjax.StepOutput, float],
        prompt: Sequence[int],
        question: Sequence[int],
        reference: jax.Array | None,
        slots: int | None = None,
    ) -> Score:
        """Compresses, asks and scores; `reference` are the full cache's log-probabilities."""
        run, seconds = self.compress(method, dense[0], prompt, slots)
        if not method.reads_alone:
            seconds += dense[1]
        cache_bytes = kvjax.nbytes((run.cache, run.state))
        kept, budgeted = (float(kvjax.kept_tokens(cache)[0]) for cache in (run.cache, self._budgeted(run.cache)))
        self._check_finite(method, example, run.logits)
        log_probs, speed = self.answer(method, run, question, example)
        self._check_finite(method, example, log_probs)
        answer = jnp.asarray(example.answer_ids, jnp.int32)
        nll = match = kl = None
        if len(example.answer_ids):
            nll = float(-jnp.mean(jnp.take_along_axis(log_probs, answer[:, None], axis=1)))
            if example.scored:
                match = bool(jnp.all(jnp.argmax(log_probs, axis=-1) == answer))
            if reference is not None:
                kl = float(jnp.mean(jnp.sum(jnp.exp(reference) * (reference - log_probs), axis=-1)))
        return Score(nll, match, kl, cache_bytes, kept, budgeted, seconds, speed, log_probs)

    def abstract_bytes(self, method: Method, slots: int) -> int:
        """Bytes of the compressed cache of a context of `slots` tokens, without running anything.

        Raises:
          ValueError: the method refuses such a context, by its name.
        """
        shape = jax.ShapeDtypeStruct((1, slots), jnp.int32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._model.params)
        try:
            run = jax.eval_shape(lambda *args: self._prefill(method, *args), params, shape, lengths)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"method {method.name}, a context of {slots} tokens: {error}") from error
        return kvjax.nbytes((run.cache, run.state))

    def _budgeted(self, cache: kvjax.Cache) -> kvjax.Cache:
        """The cache of the layers that a method's budget is for."""
        local = set(self._model.config.local_layers)
        others = tuple(layer for i, layer in enumerate(cache.layers) if i not in local)
        return cache.replace(layers=others) if others else cache

    def _check_finite(self, method: Method, example: tasks.Example, logits: jax.Array) -> None:
        if bool(jnp.any(jnp.isnan(logits))):
            whose = f"the weights or activations of {self._model.config.name} are not finite"
            if method.name != "full":
                whose = "the full cache gave numbers, so the method is wrong here"
            raise ValueError(f"method {method.name}: its predictions for {example.task} are NaN; {whose}.")

    def _prefill(self, method: Method, params, tokens, lengths) -> kvjax.Run:
        lm = kvjax.bind(bind(params, self._model.config), method.transform)
        how = dict(room=self._room, call_tokens=self._call_tokens, chunk=method.prefill_chunk)
        return lm.prefill(tokens, lengths, **how)

    def _prefill_alone(self, method: Method):
        if method.name not in self._alone:
            self._alone[method.name] = jax.jit(lambda *args: self._prefill(method, *args))
        return self._alone[method.name]

    def _feed(
        self, method: Method, run: kvjax.Run, ids: Sequence[int], calls_of: int | None = None
    ) -> tuple[kvjax.Run, list[jax.Array]]:
        """Feeds tokens in calls of a fixed size, and returns the logits after each of them, by call."""
        lm, size = kvjax.bind(self._step_in_place, method.transform), calls_of or self._call_tokens
        logits = []
        for start in range(0, len(ids), size):
            part = list(ids[start : start + size])
            tokens = jnp.asarray([part + [0] * (size - len(part))])
            run, after = lm.extend(run, tokens, jnp.asarray([len(part)]))
            logits.append(after[0, : len(part)])
        return run, logits
