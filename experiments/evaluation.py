"""Scores methods on examples, line by line, into a file that an interrupted run goes on with."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import gin
import jax.numpy as jnp

from experiments import results, tasks
from experiments.benchmarks import sources as task_sources
from experiments.evaluator import Asked, Evaluator, Score
from experiments.loading import on_mesh
from experiments.methods import Method, check_method_names, method_names
from kvjax.budget import budget_slots
from models import Model

_ROUNDING = 0.5  # of a token: what rounding the shares of heads adds to the mean at most
_DTYPES = ("float32", "bfloat16")
_SLOTS = 64  # prompts of different lengths are padded to a multiple of these


@gin.configurable(module="experiments")
@dataclasses.dataclass(frozen=True)
class Settings:
    """What an evaluation does; gin binds it as `Settings`, flags win.

    Attributes:
      model: smollm2, gemma3-270m, a path, or a name on the hub.
      dtype: of the weights and of what they compute.
      cache_dtype: of uncompressed keys and values, whatever `dtype` is.
      int8_weights: store the matrices of the layers in 8 bits.
      methods: names of files in configs/methods, or paths of other .gin files; `full` is always run, the others are
        compared with it.
      keep: fraction of the context that token-budget methods keep; several: each method runs once with each.
      budget: the same in tokens per KV head; None: use `keep`.
      read: what a step may read with methods that choose that: a fraction of the context or, as an int, tokens per KV
        head; several: each such method runs once with each.
      tasks: names of generated tasks, and paths of task files and texts, as a list or with commas between; see
        docs/evaluating.md.
      length: tokens of a generated context, or of a text's; several: every task once with each.
      examples: generated examples of each task and length.
      seed: of the generated tasks.
      max_examples: at most this many examples of each task and length; None: all.
      question_aware: compress after the question instead of before.
      call_tokens: the most tokens of a question that one call of the decoder takes.
      batch: examples that are read together.
      mesh: devices as named axes and sizes such as "data:2,seq:2,model:2", see `kvjax.sharding.make_mesh`: examples are
        split over "data", slots over "seq", heads and weights over "model". None: one device.
    """

    model: str = "smollm2"
    dtype: str = "float32"
    cache_dtype: str = "bfloat16"
    int8_weights: bool = False
    methods: Sequence[str] = ("full", "int4", "snapkv", "streamingllm")
    keep: float | Sequence[float] = 0.5
    budget: int | Sequence[int] | None = None
    read: float | int | Sequence[float | int] = 0.125
    tasks: str | Sequence[str] = ("synthetic",)
    length: int | Sequence[int] = 1024
    examples: int = 3
    seed: int = 0
    max_examples: int | None = None
    question_aware: bool = False
    call_tokens: int = 32
    batch: int = 1
    mesh: str | None = None

    def __post_init__(self):
        for name in ("keep", "budget", "read", "length", "tasks"):
            value = getattr(self, name)
            value = task_sources.split(value) if isinstance(value, str) else value
            several = tuple(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else (value,)
            object.__setattr__(self, name, None if value is None else several)
        for keep in self.keep:
            if not 0 < keep <= 1:
                raise ValueError(f"--keep must be in (0, 1], got {keep}.")
        for budget in self.budget or ():
            if budget < 1:
                raise ValueError(f"--budget must be at least 1 token, got {budget}.")
        for read in self.read:
            if read <= 0 or isinstance(read, float) and read > 1:
                raise ValueError(f"--read must be a fraction in (0, 1] or at least 1 token, got {read}.")
        for name in ("examples", "call_tokens", "batch"):
            if getattr(self, name) < 1:
                flag = "--batch" if name == "batch" else f"Settings.{name}"
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, name)}.")
        for length in self.length:
            if length < 1:
                raise ValueError(f"Settings.length must be at least 1, got {length}.")
        if not self.keep or not self.read or not self.length or self.budget == ():
            raise ValueError("Settings.keep, budget, read and length must not be empty lists.")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"--max_examples must be at least 1, got {self.max_examples}.")
        if self.cache_dtype not in _DTYPES:
            raise ValueError(f"--cache_dtype must be one of {', '.join(_DTYPES)}, got {self.cache_dtype!r}.")
        task_sources.check(self.tasks)
        check_method_names(self.methods, paths=True)
        if not self.methods:
            raise ValueError(f"--methods must name at least one of {', '.join(method_names())}.")

    @property
    def budgets(self) -> tuple[int | float, ...]:
        """Returns the budgets that methods run with, one after the other."""
        return tuple(map(float, self.keep)) if self.budget is None else self.budget

    def decides(self) -> dict[str, object]:
        """Returns what results depend on, not what only adds lines, nor how many rows are read together."""
        fields = dataclasses.asdict(self)
        for name in ("methods", "keep", "budget", "read", "length", "max_examples", "examples", "batch"):
            del fields[name]
        return fields | {"tasks": task_sources.files(self.tasks)}


@contextlib.contextmanager
def loaded(settings: Settings) -> Iterator[Model]:
    """Loads the model of an evaluation, on its mesh, in whose scope all that follows then runs."""
    with on_mesh(settings.mesh) as load:
        yield load(settings.model, settings.dtype, int8=settings.int8_weights)


def load_examples(settings: Settings, model: Model) -> list[tasks.Example]:
    """Returns all examples there are, of which `tasks.first_of_each` selects those to run; fewer generated ones."""
    count = min(settings.examples, settings.max_examples or settings.examples)
    return task_sources.load(settings.tasks, model, lengths=settings.length, count=count, seed=settings.seed)


def check_fit(examples: Sequence[tasks.Example], methods: Sequence[Method], model: Model) -> None:
    """Refuses examples that the model or a budget cannot take, before anything runs."""
    longest = model.config.max_positions
    for index, example in enumerate(examples):
        context = len(example.context_ids)
        total = context + example.tokens_after
        if total > longest:
            raise ValueError(
                f"example {index} ({example.task}) has {total} tokens with what may be generated; {model.config.name} "
                f"was trained for {longest}."
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
      most_room: tokens that may follow any prompt.
      longest: tokens of the longest prompt, by the length that examples were made for.
      positions: that the model was trained for.
    """

    most_room: int
    longest: Mapping[int | None, int]
    positions: int

    @classmethod
    def of(cls, examples: Sequence[tasks.Example], settings: Settings, model: Model) -> Padding:
        """Joins what all of them need."""
        longest: dict[int | None, int] = {}
        for example in examples:
            prompt, _ = prompt_and_question(example, settings)
            longest[example.length] = max(longest.get(example.length, 0), len(prompt))
        return cls(max(example.tokens_after for example in examples), longest, model.config.max_positions)

    def slots(self, example: tasks.Example, settings: Settings) -> int:
        """Returns the prompt's length, padded to a multiple of 64 tokens, to the longest of its kind or as fits."""
        prompt, _ = prompt_and_question(example, settings)
        padded = min(self.longest[example.length], -(-len(prompt) // _SLOTS) * _SLOTS)
        return min(padded, max(len(prompt), self.positions - example.tokens_after))

    def room(self, slots: int) -> int:
        """Returns how many tokens may follow a prompt that is padded to so many."""
        return min(self.most_room, self.positions - slots)


def numbered(examples: Sequence[tasks.Example]) -> Iterator[tuple[int, tasks.Example]]:
    """Yields each example with its number among those of its task and length."""
    counts: dict[tuple[str, int | None], int] = {}
    for example in examples:
        kind = example.task, example.length
        yield counts.setdefault(kind, 0), example
        counts[kind] += 1


def line_of(method: Method, example: tasks.Example, index: int) -> results.Line:
    """Returns which line of the results a method writes about an example."""
    told = method.keep, method.budget_tokens, method.read
    return results.Line(method.name, example.task, index, example.length, *told)


def lines_of(methods: Sequence[Method], examples: Sequence[tasks.Example]) -> list[results.Line]:
    """Returns the lines that an evaluation writes."""
    return [line_of(method, example, index) for index, example in numbered(examples) for method in methods]


def sources(
    settings: Settings,
    model: Model,
    methods: Sequence[Method],
    examples: Sequence[tasks.Example],
    every: Sequence[tasks.Example],
) -> results.Sources:
    """Names what the lines of an evaluation are of: the methods' configurations, the tokens and shapes of examples.

    Args:
      settings: of the evaluation.
      model: that answers.
      methods: that run.
      examples: that are run, the first of each task.
      every: all that there are, so that lines of an earlier run of more of them are checked too.
    """
    padding = Padding.of(examples, settings, model)
    run = {(example.task, example.length, index) for index, example in numbered(examples)}

    def of(index: int, example: tasks.Example) -> dict[str, str | int]:
        digest = hashlib.sha256(json.dumps(dataclasses.astuple(example)).encode()).hexdigest()
        content = {"content": digest[:16]}
        if (example.task, example.length, index) not in run:
            return content
        return content | {"padded prompt": padding.slots(example, settings)}

    return results.Sources(
        methods={method.setting: method.config for method in methods},
        examples={(example.task, example.length, index): of(index, example) for index, example in numbered(every)},
        growing=task_sources.GENERATED if task_sources.files(settings.tasks) else None,
    )


def evaluate(
    settings: Settings,
    model: Model,
    methods: Sequence[Method],
    examples: Sequence[tasks.Example],
    file: results.ResultsFile,
    padding: Padding | None = None,
) -> Iterator[results.Row]:
    """Scores what `file` lacks and yields each line as it is written.

    Args:
      settings: of the evaluation.
      model: that answers.
      methods: the full cache first.
      examples: in the order in which they are numbered.
      file: takes the lines.
      padding: None: what these examples need.
    """
    padding = padding or Padding.of(examples, settings, model)
    whole = settings.mesh is not None
    evaluator = Evaluator(model, methods, settings.call_tokens, jnp.dtype(settings.cache_dtype), whole)
    warm: set[tuple[str, int]] = set()
    dense, prompts = None, None
    for numbers, asked in _together(settings, methods, examples, file, padding):
        lines = [
            [line_of(method, example, index) for index, example in zip(numbers, asked.examples)] for method in methods
        ]
        missing = [method for method, of in zip(methods, lines) if any(line not in file for line in of)]
        if prompts != (asked.slots, asked.prompts):
            if ("prefill", asked.slots) not in warm:
                evaluator.prefill(asked)  # compiles
                warm.add(("prefill", asked.slots))
            dense, prompts = evaluator.prefill(asked), (asked.slots, asked.prompts)
        references = [None] * len(asked.examples)
        for method in [methods[0], *(m for m in missing if m is not methods[0])]:
            if (method.setting, asked.slots) not in warm:
                evaluator.warm_up(method, dense[0], asked)
                warm.add((method.setting, asked.slots))
            scores = evaluator.score(method, dense, asked, references)
            if method is methods[0]:
                references = [score.log_probs for score in scores]
            for index, example, prompt, score in zip(numbers, asked.examples, asked.prompts, scores):
                line = line_of(method, example, index)
                if line not in file:
                    row = _row(line, method, example, prompt, score, evaluator.full_bytes(asked.slots))
                    file.append(row)
                    yield row


def _together(
    settings: Settings,
    methods: Sequence[Method],
    examples: Sequence[tasks.Example],
    file: results.ResultsFile,
    padding: Padding,
) -> Iterator[tuple[list[int], Asked]]:
    """The numbers of examples that lack lines, and the examples, as many as are read together.

    They have one padded length, and all generate a text or none does. The last one of a group that is not full is
    repeated, so that no other shape is compiled; nothing is written of the copies.
    """
    groups: dict[tuple[int, bool], list[tuple[int, tasks.Example]]] = {}
    for index, example in numbered(examples):
        if any(line_of(method, example, index) not in file for method in methods):
            kind = (padding.slots(example, settings), example.generates) if settings.batch > 1 else len(groups)
            groups.setdefault(kind, []).append((index, example))
    for group in groups.values():
        for start in range(0, len(group), settings.batch):
            some = group[start : start + settings.batch]
            some += some[-1:] * (settings.batch - len(some))
            chosen = [example for _, example in some]
            prompts, questions = zip(*(prompt_and_question(example, settings) for example in chosen))
            slots = padding.slots(chosen[0], settings)
            yield [index for index, _ in some], Asked(chosen, prompts, questions, slots, padding.room(slots))


def _row(
    line: results.Line, method: Method, example: tasks.Example, prompt: Sequence[int], score: Score, full_bytes: int
) -> results.Row:
    """A line of the results."""
    budget = method.transform.schedule.budget
    asked = None if budget is None else budget_slots(budget, len(prompt))
    return {
        **line._asdict(),
        "nll": score.nll,
        "exact_match": score.exact_match,
        "score": score.score,
        "metric": example.metric,
        "prediction": score.prediction,
        "cache_bytes": score.cache_bytes,
        "full_bytes": full_bytes,
        "read_bytes": score.read_bytes,
        "allocated_bytes": score.allocated_bytes,
        "kept_tokens": score.kept_tokens,
        "prefill_seconds": score.prefill_seconds,
        "decode_tokens_per_second": score.decode_tokens_per_second,
        "kl": score.kl,
        "depth": example.depth,
        "context_tokens": len(example.context_ids),
        "budget_tokens": asked,
        "over_budget": None if asked is None else score.budgeted_tokens > asked + _ROUNDING,
    }
