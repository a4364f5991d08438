"""Compresses the cache of a real model, asks it about what it read, and says what that saved and cost.

    python -m experiments.evaluate --gin_file=configs/runs/quickstart.gin --output_dir=out/quickstart

For every example the context is prefilled and compressed without seeing the question (with --question_aware:
after it), the question follows, and the answer is scored under teacher forcing, token by token, so that a method
that acts at every step does so. Greedy decoding gives exactly the answer if and only if each of its tokens is the
most likely one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence

import gin
import jax
import tqdm
from absl import flags

from experiments import cli, pictures, report, results, synthetic, tasks
from experiments.calibrations import Calibrations
from experiments.evaluator import Evaluator
from experiments.methods import Method, check_method_names, load_method, method_names
from kvjax.budget import budget_slots
from models import Model, load_model
from models.assets import ESSAYS, fetch

flags.adopt_module_key_flags(cli)
_BUDGET = flags.DEFINE_integer("budget", None, "The same in tokens per KV head.")
_TASKS = flags.DEFINE_string("tasks", None, "A JSONL file of tasks; without it, synthetic ones.")
_MAX_EXAMPLES = flags.DEFINE_integer("max_examples", None, "At most this many examples of each task.")
_QUESTION_AWARE = flags.DEFINE_bool("question_aware", None, "Compress after the question.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Discard what output_dir holds.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would run and how many bytes it would take.")
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
        check_method_names(self.methods)
        if not self.methods:
            raise ValueError(f"--methods must name at least one of {', '.join(method_names())}.")


def read_settings() -> Settings:
    """The settings of the gin files, the bindings and the flags, in that order."""
    if cli.KEEP.value is not None and _BUDGET.value is not None:
        raise ValueError("--keep and --budget say the same thing in two ways; pass one of them.")
    gin.parse_config_files_and_bindings(cli.GIN_FILE.value, cli.GIN_BINDINGS.value, skip_unknown=False)
    given = {
        name: flag.value
        for name, flag in (
            ("model", cli.MODEL),
            ("methods", cli.METHODS),
            ("keep", cli.KEEP),
            ("budget", _BUDGET),
            ("tasks", _TASKS),
            ("max_examples", _MAX_EXAMPLES),
            ("question_aware", _QUESTION_AWARE),
        )
        if flag.value is not None
    }
    if cli.KEEP.value is not None:
        given["budget"] = None
    return Settings(**given)


def load_methods(settings: Settings, model: Model) -> list[Method]:
    """`full`, then the other methods in the order given."""
    budget = settings.keep if settings.budget is None else settings.budget
    configs = dict(
        gin_files=cli.GIN_FILE.value,
        bindings=cli.GIN_BINDINGS.value,
        calibrate=Calibrations(model),
        tokenizer=model.tokenizer,
    )
    return [load_method(name, budget=budget, **configs) for name in dict.fromkeys(["full", *settings.methods])]


def load_examples(settings: Settings, model: Model) -> list[tasks.Example]:
    """The examples of the task file, or synthetic ones."""
    vocab = model.config.vocab_size
    if settings.tasks is not None:
        return tasks.read_tasks(
            settings.tasks, model.tokenizer, vocab_size=vocab, max_examples=settings.max_examples
        )
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
            budget = method.transform.budget
            if isinstance(budget, int) and budget >= context:
                raise ValueError(
                    f"--budget: {method.name} would keep {budget} tokens, but example {index} ({example.task}) has a "
                    f"context of {context}: nothing would be compressed."
                )


def check_start(
    settings: Settings, model: Model, methods: Sequence[Method], examples: Sequence[tasks.Example]
) -> None:
    """Traces every method on the shortest context, where a fractional budget is smallest, before anything runs."""
    evaluator = Evaluator(model, methods, room=1, call_tokens=settings.call_tokens)
    for method in methods:
        evaluator.abstract_bytes(method, min(len(example.context_ids) for example in examples))


def prompt_and_question(example: tasks.Example, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is read before the cache is compressed, and what after it."""
    if settings.question_aware:
        return example.context_ids + example.question_ids, ()
    return example.context_ids, example.question_ids


def evaluate(
    settings: Settings, model: Model, methods: Sequence[Method], examples: Sequence[tasks.Example], file
) -> Iterator[results.Row]:
    """Scores what `file` lacks, example by example, and yields each line as it is written.

    Prompts of different lengths are padded to a multiple of 64 tokens, or to the longest, and share what was compiled.
    """
    room = max(len(e.question_ids) + len(e.answer_ids) for e in examples) + 1
    evaluator = Evaluator(model, methods, room, settings.call_tokens)
    longest = max(len(prompt_and_question(e, settings)[0]) for e in examples)
    warm: set[tuple[str, int]] = set()
    counts: dict[str, int] = {}
    for example in examples:
        index = counts.setdefault(example.task, 0)
        counts[example.task] += 1
        missing = [m for m in methods if (m.name, example.task, index) not in file]
        if not missing:
            continue
        prompt, question = prompt_and_question(example, settings)
        slots = min(longest, -(-len(prompt) // _SLOTS) * _SLOTS)
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
            budget = method.transform.budget
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
                "budget_tokens": None if budget is None else budget_slots(budget, len(prompt)),
            }
            file.append(row)
            yield row


def run() -> None:
    """The program."""
    settings = read_settings()
    model = load_model(settings.model, settings.dtype, int8=settings.int8_weights)
    methods = load_methods(settings, model)
    examples = load_examples(settings, model)
    check_fit(examples, methods, model)
    configs = {method.name: method.config for method in methods}
    if _DRY_RUN.value:
        _print_plan(settings, model, methods, examples)
        return
    check_start(settings, model, methods, examples)
    if cli.OUTPUT_DIR.value is None:
        raise ValueError("--output_dir says where results go; it is required unless --dry_run is given.")
    decides = dataclasses.asdict(settings)
    for name in ("methods", "max_examples", "examples"):
        del decides[name]  # these only add lines
    command = [os.path.basename(sys.executable), "-m", "experiments.evaluate", *sys.argv[1:]]
    with results.ResultsFile(
        cli.OUTPUT_DIR.value, decides | {"bindings": list(cli.GIN_BINDINGS.value)}, overwrite=_OVERWRITE.value
    ) as file:
        total = len(examples) * len(methods)
        lines = evaluate(settings, model, methods, examples, file)
        try:
            with tqdm.tqdm(total=total, initial=len(file.rows), unit="line", smoothing=0.1) as bar:
                for row in lines:
                    bar.set_postfix_str(f"{row['task']} {row['method']}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            print(
                f"\ninterrupted: {len(file.rows)} of {total} lines are kept in {file.path}; the same command goes on.",
                file=sys.stderr,
            )
            sys.exit(130)
        rows = file.rows
    _write_report(rows, command, configs, window_note(model))


def window_note(model: Model) -> str:
    """What was done in layers with a sliding window; empty where there are none."""
    config = model.config
    local, L = len(config.local_layers), config.num_layers
    if not local:
        return ""
    note = f"{local} of {L} layers of {config.name} have a sliding window of {config.window} tokens. "
    if local == L:
        return note + "Methods compress them all; attention and scores see what is inside the window."
    note += "Where a context is longer, every method, the full cache included, keeps just the window there, as it is"
    return note + f"; what a method does, and its budget, is about the other {L - local}."


def _write_report(rows, command, configs, note: str) -> None:
    folder = cli.OUTPUT_DIR.value
    gin_config = "\n".join(f"# {name}\n{config}" for name, config in configs.items())
    summary = results.write_summary(
        os.path.join(folder, "summary.json"),
        rows,
        command=command,
        gin_config=gin_config,
        device=jax.devices()[0].device_kind,
    )
    written = ["results.jsonl", "summary.json"]
    pictures.plot_pareto(summary["methods"], os.path.join(folder, "pareto.png"))
    written.append("pareto.png")
    if any(row["depth"] is not None for row in rows):
        pictures.plot_needle(rows, os.path.join(folder, "needle.png"))
        written.append("needle.png")
    print(report.table(summary["methods"]))
    if note:
        print("\n" + textwrap.fill(note, 120))
    print(f"\n{', '.join(written)} are in {folder}.")


def _print_plan(settings, model, methods, examples) -> None:
    room = max(len(e.question_ids) + len(e.answer_ids) for e in examples) + 1
    evaluator = Evaluator(model, methods, room, settings.call_tokens)
    longest = max(len(e.context_ids) for e in examples)
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.task] = counts.get(example.task, 0) + 1
    print(f"model     {model.config.name}, {settings.dtype}")
    print("examples  " + ", ".join(f"{count} {task}" for task, count in counts.items()))
    print(f"contexts  up to {longest} tokens, {room} more reserved")
    sizes = [evaluator.abstract_bytes(method, longest) for method in methods]
    width = max(len(method.name) for method in methods)
    if note := window_note(model):
        print(textwrap.fill(note, 120, initial_indent="windows   ", subsequent_indent=" " * 10))
    print("cache bytes at that length, before anything runs:")
    for method, size in zip(methods, sizes):
        note = "" if method.transform.budget is not None else "  no token budget"
        print(f"  {method.name:<{width}}  {report.human_bytes(size):>9}  {sizes[0] / size:5.1f}x smaller{note}")
    for method in methods:
        print(f"\n# {method.name}\n{method.config}", end="")


if __name__ == "__main__":
    cli.start(run)
