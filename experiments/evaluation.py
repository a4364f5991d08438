"""Scores methods on examples, line by line, into a file that an interrupted run goes on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

import gin

from experiments import results, synthetic, tasks
from experiments.evaluator import Evaluator
from experiments.methods import Method, check_method_names, method_names
from kvjax.budget import budget_slots
from models import Model
from models.assets import ESSAYS, fetch

_ROUNDING = 0.5  # of a token: what rounding the shares of heads adds to the mean at most
_SLOTS = 64  # prompts of different lengths are padded to a multiple of these


@gin.configurable(module="experiments")
@dataclasses.dataclass(frozen=True)
class Settings:
    """What an evaluation does; gin binds it as `Settings`, flags win.

    Attributes:
      model: smollm2, gemma3-270m, a path, or a name on the hub.
      dtype: of weights and cache.
      int8_weights: store the matrices of the layers in 8 bits.
      methods: names of files in configs/methods; `full` is always run, the others are compared with it.
      keep: fraction of the context that token-budget methods keep.
      budget: the same in tokens per KV head; None: use `keep`.
      tasks: a task file; None: synthetic tasks.
      synthetic_tasks: which of them.
      length: tokens of a synthetic context.
      examples: synthetic examples of each task.
      seed: of the synthetic tasks.
      max_examples: at most this many examples of each task; None: all.
      question_aware: compress after the question instead of before.
      call_tokens: the most tokens of a question that one call of the decoder takes.
    """

    model: str = "smollm2"
    dtype: str = "float32"
    int8_weights: bool = False
    methods: Sequence[str] = ("full", "int4", "snapkv", "streamingllm")
    keep: float = 0.5
    budget: int | None = None
    tasks: str | None = None
    synthetic_tasks: Sequence[str] = synthetic.SYNTHETIC_TASKS
    length: int = 1024
    examples: int = 3
    seed: int = 0
    max_examples: int | None = None
    question_aware: bool = False
    call_tokens: int = 32

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"--keep must be in (0, 1], got {self.keep}.")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"--budget must be at least 1 token, got {self.budget}.")
        for name in ("length", "examples", "call_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"Settings.{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"--max_examples must be at least 1, got {self.max_examples}.")
        if self.tasks is not None and not self.tasks:
            raise ValueError("--tasks must name a file, got an empty name.")
        check_method_names(self.methods)
        if not self.methods:
            raise ValueError(f"--methods must name at least one of {', '.join(method_names())}.")


def load_examples(settings: Settings, model: Model) -> list[tasks.Example]:
    """All examples of the task file, of which `tasks.first_of_each` selects those to run; or synthetic ones."""
    vocab = model.config.vocab_size
    if settings.tasks is not None:
        return tasks.read_tasks(settings.tasks, model.tokenizer, vocab_size=vocab)
    essays = [path.read_text(encoding="utf-8") for path in sorted(fetch(ESSAYS).glob("*.txt"))]
    count = min(settings.examples, settings.max_examples or settings.examples)
    return synthetic.synthetic_tasks(
        model.tokenizer,
        essays,
        length=settings.length,
        count=count,
        seed=settings.seed,
        tasks=settings.synthetic_tasks,
    )


def check_fit(examples: Sequence[tasks.Example], methods: Sequence[Method], model: Model) -> None:
    """Refuses examples that the model or a budget cannot take, before anything runs."""
    longest = model.config.max_positions
    for index, example in enumerate(examples):
        context = len(example.context_ids)
        total = context + len(example.question_ids) + len(example.answer_ids)
        if total > longest:
            raise ValueError(
                f"example {index} ({example.task}) has {total} tokens; {model.config.name} was trained for {longest}."
            )
        for method in methods:
            budget = method.transform.schedule.budget
            if isinstance(budget, int) and budget >= context:
                raise ValueError(
                    f"--budget: {method.name} would keep {budget} tokens, but example {index} ({example.task}) has a "
                    f"context of {context}: nothing would be compressed."
                )


def prompt_and_question(example: tasks.Example, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is read before the cache is compressed, and what after it."""
    if settings.question_aware:
        return example.context_ids + example.question_ids, ()
    return example.context_ids, example.question_ids


@dataclasses.dataclass(frozen=True)
class Padding:
    """The shapes that examples share, so that prompts of different lengths share what was compiled.

    Attributes:
      room: tokens that may follow a prompt.
      longest: tokens of the longest prompt.
    """

    room: int
    longest: int

    @classmethod
    def of(cls, examples: Sequence[tasks.Example], settings: Settings) -> Padding:
        """Joins what all of them need."""
        return cls(
            room=max(len(e.question_ids) + len(e.answer_ids) for e in examples) + 1,
            longest=max(len(prompt_and_question(e, settings)[0]) for e in examples),
        )

    def slots(self, prompt: Sequence[int]) -> int:
        """The prompt's length, padded to a multiple of 64 tokens, or to the longest."""
        return min(self.longest, -(-len(prompt) // _SLOTS) * _SLOTS)


def numbered(examples: Sequence[tasks.Example]) -> Iterator[tuple[int, tasks.Example]]:
    """Each example with its number among those of its task."""
    counts: dict[str, int] = {}
    for example in examples:
        yield counts.setdefault(example.task, 0), example
        counts[example.task] += 1


def sources(
    settings: Settings,
    methods: Sequence[Method],
    examples: Sequence[tasks.Example],
    every: Sequence[tasks.Example],
) -> results.Sources:
    """Names what the lines of an evaluation are of: the methods' configurations, the tokens and shapes of examples.

    Args:
      settings: of the evaluation.
      methods: that run.
      examples: that are run, the first of each task.
      every: all that there are, so that lines of an earlier run of more of them are checked too.
    """
    padding = Padding.of(examples, settings)
    run = {(example.task, index) for index, example in numbered(examples)}

    def of(index: int, example: tasks.Example) -> dict[str, str | int]:
        digest = hashlib.sha256(json.dumps(dataclasses.astuple(example)).encode()).hexdigest()
        content = {"content": digest[:16]}
        if (example.task, index) not in run:
            return content
        slots = padding.slots(prompt_and_question(example, settings)[0])
        return content | {"padded prompt": slots, "room behind it": padding.room}

    return results.Sources(
        methods={method.name: method.config for method in methods},
        examples={(example.task, index): of(index, example) for index, example in numbered(every)},
        complete=settings.tasks is not None,
    )


def evaluate(
    settings: Settings,
    model: Model,
    methods: Sequence[Method],
    examples: Sequence[tasks.Example],
    file: results.ResultsFile,
    padding: Padding | None = None,
) -> Iterator[results.Row]:
    """Scores what `file` lacks, example by example, and yields each line as it is written.

    Args:
      settings: of the evaluation.
      model: that answers.
      methods: the full cache first.
      examples: in the order in which they are numbered.
      file: takes the lines.
      padding: None: what these examples need.
    """
    padding = padding or Padding.of(examples, settings)
    evaluator = Evaluator(model, methods, padding.room, settings.call_tokens)
    warm: set[tuple[str, int]] = set()
    for index, example in numbered(examples):
        missing = [m for m in methods if (m.name, example.task, index) not in file]
        if not missing:
            continue
        prompt, question = prompt_and_question(example, settings)
        slots = padding.slots(prompt)
        if ("prefill", slots) not in warm:
            evaluator.prefill(prompt, slots)  # compiles
            warm.add(("prefill", slots))
        dense = evaluator.prefill(prompt, slots)
        reference, full_bytes = None, None
        for method in [methods[0], *(m for m in missing if m is not methods[0])]:
            if (method.name, slots) not in warm:
                evaluator.score(method, example, dense, prompt, question, None, slots)  # compiles
                warm.add((method.name, slots))
            score = evaluator.score(method, example, dense, prompt, question, reference, slots)
            if method is methods[0]:
                reference, full_bytes = score.log_probs, score.cache_bytes
            if method not in missing:
                continue
            budget = method.transform.schedule.budget
            asked = None if budget is None else budget_slots(budget, len(prompt))
            row = {
                "method": method.name,
                "task": example.task,
                "example": index,
                "nll": score.nll,
                "exact_match": score.exact_match,
                "cache_bytes": score.cache_bytes,
                "full_bytes": full_bytes,
                "kept_tokens": score.kept_tokens,
                "prefill_seconds": score.prefill_seconds,
                "decode_tokens_per_second": score.decode_tokens_per_second,
                "kl": score.kl,
                "depth": example.depth,
                "context_tokens": len(example.context_ids),
                "budget_tokens": asked,
                "over_budget": None if asked is None else score.budgeted_tokens > asked + _ROUNDING,
            }
            file.append(row)
            yield row
