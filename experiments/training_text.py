"""What training reads: contexts with what follows them, from essays, a text file or a file of questions."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import gin
import numpy as np

from experiments import synthetic, tasks
from experiments.benchmarks import task_files
from models import Model
from models.assets import ESSAYS, fetch

_QUESTIONS = tuple(task for task in synthetic.SYNTHETIC_TASKS if task != "text")
_PIECES = 16  # of a text file, so that sentences from several places surround a fact
_OTHER_SEED = 1_000_000  # keeps these questions apart from those of the evaluation


class Batch(NamedTuple):
    """Contexts, and the tokens that follow each."""

    context: np.ndarray  # i32[B, P], padded at its end
    lengths: np.ndarray  # i32[B], tokens of each context
    follow: np.ndarray  # i32[B, T]
    weight: np.ndarray  # f32[B, T], what predicting a token of `follow` counts; sums to 1; 0 for the first


@gin.configurable(module="experiments")
@dataclasses.dataclass(frozen=True)
class TrainingText:
    """Where batches come from; gin binds it as `TrainingText`.

    An example is a piece of text and its continuation, or a context with a question and its answer, of which only the
    answer counts.

    Attributes:
      file: a text file, or tasks as `benchmarks.task_files` reads them (.jsonl); None: the essays that the
        evaluation does not hold back.
      context: tokens of a context at most.
      follow: tokens that follow it.
      questions: fraction of the examples that are questions; files of tasks hold nothing else.
      tasks: which synthetic questions are asked about a text.
      pool: how many of each are made.
      validation: fraction of the text, and of the questions, that is never trained on.
    """

    file: str | None = None
    context: int = 512
    follow: int = 128
    questions: float = 0.5
    tasks: Sequence[str] = _QUESTIONS
    pool: int = 64
    validation: float = 0.1

    def __post_init__(self):
        if self.context < 1 or self.follow < 2:
            raise ValueError(
                f"TrainingText: context must be at least 1 and follow at least 2, got {self.context} and {self.follow}."
            )
        if not 0 <= self.questions <= 1 or not 0 < self.validation < 1:
            raise ValueError(
                "TrainingText: questions must be in [0, 1] and validation in (0, 1), got "
                f"{self.questions} and {self.validation}."
            )
        if self.pool < 2:
            raise ValueError(f"TrainingText.pool must be at least 2, got {self.pool}.")


class Batches:
    """Batches by number: the same number gives the same batch, so that a training can be taken up anywhere.

    Attributes:
      fingerprint: of the tokens that batches are made of.
    """

    def __init__(self, text: TrainingText, model: Model, seed: int):
        """Reads the text and makes the questions.

        Raises:
          ValueError: there is too little text, a question does not fit, or the model has too few positions.
        """
        longest = text.context + text.follow
        if longest > model.config.max_positions:
            raise ValueError(
                f"TrainingText: context and follow make {longest} tokens; {model.config.name} was trained for "
                f"{model.config.max_positions}."
            )
        self._text, self._seed = text, seed
        self._opening = list(model.tokenizer.opening)
        questions = []
        if text.file is not None and text.file.endswith(".jsonl"):
            ids, share = [], 1.0
            questions = task_files.read_tasks(text.file, model.tokenizer, vocab_size=model.config.vocab_size)
        else:
            documents, share = _documents(text), text.questions
            ids = model.tokenizer.encode("\n\n".join(documents)) if share < 1 else []
            if share > 0:
                how = dict(length=text.context, count=text.pool, seed=_OTHER_SEED + seed, tasks=text.tasks)
                questions = synthetic.synthetic_tasks(model.tokenizer, documents, **how)
        self._share = share
        self.fingerprint = _fingerprint(ids, questions)
        for number, example in enumerate(questions):
            _check(example, number, text)
        count = max(1, round(text.validation * len(questions)))
        order = np.random.default_rng([seed, 2]).permutation(len(questions))
        questions = [questions[i] for i in order]
        cut = len(ids) - max(longest, round(text.validation * len(ids)))
        if share < 1 and cut < longest:
            raise ValueError(f"TrainingText: {len(ids)} tokens of text are too few for pieces of {longest}.")
        if share > 0 and len(questions) < 2:
            raise ValueError(f"TrainingText: got {len(questions)} questions, expected at least 2.")
        self._parts = {  # by what they are for: a number that seeds their choice, text, questions
            "training": (0, ids[:cut], questions[count:]),
            "validation": (1, ids[cut:], questions[:count]),
        }

    def training(self, number: int, rows: int) -> Batch:
        """The batch that training step `number` sees."""
        return self._batch("training", number, rows)

    def validation(self, number: int, rows: int) -> Batch:
        """A batch of what is never trained on."""
        return self._batch("validation", number, rows)

    def _batch(self, part: str, number: int, rows: int) -> Batch:
        which, ids, questions = self._parts[part]
        rng = np.random.default_rng([self._seed, which, number])
        P, T = self._text.context, self._text.follow
        context, lengths = np.zeros((rows, P), np.int32), np.full(rows, P, np.int32)
        follow, weight = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.float32)
        for row in range(rows):
            if rng.random() < self._share:
                example = questions[rng.integers(len(questions))]
                lengths[row] = len(example.context_ids)
                context[row, : lengths[row]] = example.context_ids
                asked, end = len(example.question_ids), len(example.question_ids) + len(example.answer_ids)
                follow[row, :end] = example.question_ids + example.answer_ids
                weight[row, max(asked, 1) : end] = 1.0
            else:
                size = P + T - len(self._opening)
                start = rng.integers(len(ids) - size + 1)
                piece = [*self._opening, *ids[start : start + size]]
                context[row], follow[row] = piece[:P], piece[P:]
                weight[row, 1:] = 1.0
        weight /= weight.sum(axis=1, keepdims=True)
        return Batch(context, lengths, follow, weight)


def _fingerprint(ids: Sequence[int], questions: Sequence[tasks.Example]) -> str:
    digest = hashlib.sha256(np.asarray(ids, np.int64).tobytes())
    for example in questions:
        answer = example.answer_ids
        seen = example.task, example.context_ids, example.question_ids, answer, bool(answer), example.depth
        digest.update(repr(seen).encode())
    return digest.hexdigest()[:16]


def _documents(text: TrainingText) -> list[str]:
    if text.file is None:
        essays = [path.read_text(encoding="utf-8") for path in sorted(fetch(ESSAYS).glob("*.txt"))]
        return synthetic.split_essays(essays)[1]
    try:
        whole = pathlib.Path(text.file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"TrainingText.file: {text.file} is not UTF-8 ({error.reason}).") from None
    size = max(1, -(-len(whole) // _PIECES))
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _check(example: tasks.Example, number: int, text: TrainingText) -> None:
    """Refuses an example that does not fit into a batch."""
    after = len(example.question_ids) + len(example.answer_ids)
    if not example.answer_ids or after < 2:
        raise ValueError(f"TrainingText: question {number} ({example.task}) has no answer to be trained on.")
    for name, size in (("context", len(example.context_ids)), ("follow", after)):
        if size > getattr(text, name):
            raise ValueError(
                f"TrainingText.{name}: question {number} ({example.task}) has {size} tokens, got "
                f"{getattr(text, name)}."
            )
