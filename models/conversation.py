"""Questions about a long text, from one compressed cache of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.limits import check_whole
from kvjax.sampling import Greedy, Sampler
from models.chat_frame import ChatFrame
from models.loader import Model

_CALL = 32  # tokens of a call: questions of any length share one program
_SHORTEST = 64  # tokens that a text is padded to at least


class Conversation:
    """Keeps one compressed context and answers questions about it.

    The context is read once, when no question is known yet. What the model is shown is one turn of a user, the text
    first and the question behind it, in its chat template where it has one.

    Every layer is a compiled program of its own, which all layers of a kind share, and so do all conversations with a
    model: contexts are padded to a few lengths (see `padded_length`) and questions come in calls of a fixed size, so
    that a second question compiles nothing, and neither does a second text of about the same length.
    """

    def __init__(
        self, model: Model, method: kvjax.CacheTransform, *, room: int = 256, chunk: int | None = None
    ):
        """Compiles and reads nothing yet.

        Args:
          model: what `models.load_model` returns.
          method: what compresses the context.
          room: tokens that may follow a context: a question with its answer, or all that is kept. The cache has slots
            for them from the start; methods that free slots as tokens come take any number.
          chunk: tokens of a chunk, for methods that act while a context arrives; None reads it in one piece.

        Raises:
          ValueError: room or chunk is below 1.
          TypeError: method is not a `CacheTransform`.
        """
        if room < 1:
            raise ValueError(f"room must be at least 1 token, got {room}.")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 token or None, got {chunk}.")
        self._model, self._room, self._chunk = model, room, chunk
        self._frame = ChatFrame.of(model.tokenizer)
        self._reader = kvjax.bind(model.step, method)
        self._writer = kvjax.bind(model.step_in_place, method)
        self._run: kvjax.Run | None = None

    def read(self, text: str) -> None:
        """Reads a context and compresses it, in place of any that was read before.

        Raises:
          ValueError: the text is empty, or is with its room longer than the model has positions for.
          TypeError: it is no text.
        """
        tokenizer = self._model.tokenizer
        ids = [*self._frame.opening, *tokenizer.encode(self._frame.before + _text("context", text))]
        positions = self._model.step.limits.positions
        if positions is not None and len(ids) + self._room > positions:
            raise ValueError(
                f"context has {len(ids)} tokens, which with room for {self._room} more is beyond the {positions} "
                f"positions of {self._model.config.name}."
            )
        tokens = _padded(ids, padded_length(len(ids)))
        how = dict(room=self._room, call_tokens=min(_CALL, self._room), chunk=self._chunk)
        self._run = self._reader.prefill(tokens, jnp.asarray([len(ids)]), **how)

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 64,
        keep: bool = False,
        sampler: Sampler = Greedy(),
        key: jax.Array | None = None,
    ) -> str:
        """Answers a question.

        Args:
          question: what is asked about the context.
          max_new_tokens: the most tokens of the answer, at least 1. One that ends earlier has its stop token cut off.
          keep: go on from here: the next question follows this one and its answer. Otherwise both are forgotten, and
            the context is as it was.
          sampler: draws the tokens.
          key: PRNG key for a sampler that needs one; None: `jax.random.key(0)`.

        Returns:
          The answer, without white space around it.

        Raises:
          ValueError: nothing was read, the question is empty, `max_new_tokens` is below 1, or there is no room for
            both.
          TypeError: the question is no text, or `max_new_tokens` no whole number.
        """
        run = self._context()
        question = _text("question", question)
        check_whole("max_new_tokens", max_new_tokens, 1)
        used = self.length - int(run.prompt[0])
        before = self._frame.between if used else self._frame.within
        ids = self._model.tokenizer.encode(before + question + self._frame.after)
        self._check_room(used, len(ids), max_new_tokens)
        run = jax.tree.map(jnp.copy, run)  # what is written in place must not be the context itself
        size = _CALL if run.room.call is None else min(_CALL, run.room.call)
        for start in range(0, len(ids), size):
            run = self._extend(run, ids[start : start + size], size)
        drawn, run = self._draw(run, max_new_tokens, sampler, jax.random.key(0) if key is None else key)
        if keep:
            self._run = run
        return self._model.tokenizer.decode(drawn).strip()

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, its room and all that the method remembers included."""
        run = self._context()
        return kvjax.nbytes((run.cache, run.state))

    @property
    def kept(self) -> float:
        """Tokens that a KV head holds, on average over heads and layers."""
        return float(kvjax.kept_tokens(self._context().cache)[0])

    @property
    def length(self) -> int:
        """Tokens that were read and, with `keep`, asked and answered."""
        return int(self._context().cache.length[0])

    def _context(self) -> kvjax.Run:
        if self._run is None:
            raise ValueError("a context must be read first: call read(text).")
        return self._run

    def _check_room(self, used: int, asked: int, new: int) -> None:
        """Checks that a question and its answer fit the cache and the model."""
        what = f"question has {asked} tokens and may get {new} new ones"
        if self._run.room.total is not None and used + asked + new > self._run.room.total:
            taken = f", of which {used} are taken" if used else ""
            raise ValueError(
                f"{what}, but there is room for {self._run.room.total} after the context{taken}: make the conversation "
                f"with room={used + asked + new} or more."
            )
        positions = self._model.step.limits.positions
        if positions is not None and self.length + asked + new > positions:
            raise ValueError(
                f"{what} after {self.length} tokens, which is beyond the {positions} positions of "
                f"{self._model.config.name}."
            )

    def _draw(self, run: kvjax.Run, count: int, sampler: Sampler, key: jax.Array) -> tuple[list[int], kvjax.Run]:
        """Draws up to so many tokens, one call after another; what ends the answer is not read."""
        drawn: list[int] = []
        for _ in range(count):
            token = int(_next(run.logits, key, run.cache.length, sampler=sampler)[0])
            if token < 0:
                raise ValueError(f"{self._model.config.name} predicts NaN: its weights or activations are not finite.")
            if token in self._model.tokenizer.eos_ids:
                break
            drawn.append(token)
            run = self._extend(run, [token], 1)
        return drawn, run

    def _extend(self, run: kvjax.Run, ids: list[int], size: int) -> kvjax.Run:
        return self._writer.extend(run, _padded(ids, size), jnp.asarray([len(ids)]))[0]


def answer(
    model: Model,
    method: kvjax.CacheTransform,
    context: str,
    question: str,
    *,
    max_new_tokens: int = 64,
    chunk: int | None = None,
) -> str:
    """Reads a context, compresses it and answers one question about it; see `Conversation`, which answers many.

    Args:
      model: what `models.load_model` returns.
      method: what compresses the context.
      context: the text, read before the question is known.
      question: about it.
      max_new_tokens: the most tokens of the answer.
      chunk: see `Conversation`.
    """
    check_whole("max_new_tokens", max_new_tokens, 1)
    frame = ChatFrame.of(model.tokenizer)
    tokens = len(model.tokenizer.encode(frame.within + _text("question", question) + frame.after))
    conversation = Conversation(model, method, room=padded_length(tokens + max_new_tokens), chunk=chunk)
    conversation.read(context)
    return conversation.ask(question, max_new_tokens=max_new_tokens)


def padded_length(tokens: int) -> int:
    """Returns what so many tokens are padded to: 64, 96, 128, 192, 256, ...; never half as many more, from 64 on."""
    power = _SHORTEST
    while power < tokens:
        power *= 2
    between = power // 4 * 3
    return between if _SHORTEST < power and tokens <= between else power


def _padded(ids: list[int], size: int) -> jax.Array:
    return jnp.asarray(np.pad(np.asarray(ids, np.int32), (0, size - len(ids)))[None])


def _text(name: str, given: str) -> str:
    if not isinstance(given, str):
        raise TypeError(f"{name} must be a text, got {type(given).__name__}.")
    if not given.strip():
        raise ValueError(f"{name} must have some text, got {given!r}.")
    return given


@functools.partial(jax.jit, static_argnames="sampler")
def _next(logits: jax.Array, key: jax.Array, position: jax.Array, *, sampler: Sampler) -> jax.Array:
    return sampler(logits, jax.vmap(jax.random.fold_in)(kvjax.row_keys(key, logits.shape[0]), position))
