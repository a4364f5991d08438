"""Compresses the cache of a real model, asks it about what it read, and says what that saved and cost.

    python -m experiments.evaluate --gin_file=configs/runs/quickstart.gin --output_dir=out/quickstart

For every example the context is prefilled and compressed without seeing the question (with --question_aware:
after it), and the question follows. Then the right answer is read token by token, for its likelihood, and a text is
generated greedily, which the task's own metric scores. docs/evaluating.md has the tasks, the metrics and the files.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import itertools
import os
import sys
import textwrap
from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp
import tqdm
from absl import flags

from experiments import bindings, cli, evaluation, pictures, report, results, summaries, tasks
from experiments.benchmarks import sources as task_sources
from experiments.calibrations import Calibrations, fingerprint
from experiments.evaluation import Padding, Settings
from experiments.evaluator import Evaluator
from experiments.methods import Method, load_method
from models import Model

for _name in ("gin_file", "gin_bindings", "model", "methods", "keep", "context", "tasks", "output_dir", "overwrite"):
    flags.declare_key_flag(_name)
for _name in ("budget", "read", "dtype", "batch", "mesh"):
    flags.declare_key_flag(_name)
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", None, ["float32", "bfloat16"], "Of uncompressed keys and values; bfloat16 without it."
)
_MAX_EXAMPLES = flags.DEFINE_integer("max_examples", None, "At most this many examples of each task.")
_QUESTION_AWARE = flags.DEFINE_bool("question_aware", None, "Compress after the question.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would run and how many bytes it would take.")


def read_settings() -> Settings:
    """Returns the settings of the gin files, the bindings and the flags, in that order."""
    if cli.KEEP.value is not None and cli.BUDGET.value is not None:
        raise ValueError("--keep and --budget say the same thing in two ways; pass one of them.")
    sources = None if cli.TASKS.value is None else task_sources.split(cli.TASKS.value)
    if cli.CONTEXT.value is not None and sources is not None and not any(map(task_sources.takes_length, sources)):
        raise ValueError("--context is for generated tasks and texts; task files have contexts of their own.")
    cli.read_gin()
    flags_of = dict(
        model=cli.MODEL,
        methods=cli.METHODS,
        keep=cli.KEEP,
        budget=cli.BUDGET,
        read=cli.READ,
        length=cli.CONTEXT,
        dtype=cli.DTYPE,
        cache_dtype=_CACHE_DTYPE,
        batch=cli.BATCH,
        mesh=cli.MESH,
        max_examples=_MAX_EXAMPLES,
        question_aware=_QUESTION_AWARE,
    )
    given = {name: flag.value for name, flag in flags_of.items() if flag.value is not None}
    if sources is not None:
        given["tasks"] = sources
    if cli.KEEP.value is not None:
        given["budget"] = None
    try:
        settings = Settings(**given)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"Settings: {bindings.explained(error)}") from error
    idle = [name for name in ("length", "examples", "seed") if name in gin.get_bindings("Settings")]
    if idle and not any(map(task_sources.takes_length, settings.tasks)):
        named = ", ".join(f"Settings.{name}" for name in idle)
        print(f"note: {named}: of generated tasks, and those of {','.join(settings.tasks)} run.", file=sys.stderr)
    return settings


def load_methods(settings: Settings, model: Model) -> list[Method]:
    """Returns `full`, then the other methods in the order given, once for each budget and `read` that they use."""
    configs = dict(
        **cli.configs(),
        calibrate=Calibrations(model),
        tokenizer=model.tokenizer,
    )
    methods = {}
    names = dict.fromkeys(["full", *settings.methods])
    for name, budget, read in itertools.product(names, settings.budgets, settings.read):
        method = load_method(name, budget=budget, read=read, **configs)
        methods.setdefault(method.setting, method)
    return list(methods.values())


def check_start(
    settings: Settings, model: Model, methods: Sequence[Method], examples: Sequence[tasks.Example]
) -> None:
    """Traces every method on the shortest context, where a fractional budget is smallest, before anything runs."""
    evaluator = Evaluator(model, methods, settings.call_tokens, jnp.dtype(settings.cache_dtype))
    shortest = min(len(example.context_ids) for example in examples)
    for method in methods:
        evaluator.bytes_at_rest(method, shortest)


def run() -> None:
    """The program."""
    settings = read_settings()
    configured = gin.operative_config_str()
    with evaluation.loaded(settings) as model:
        _run(settings, configured, model)


def _run(settings: Settings, configured: str, model: Model) -> None:
    methods = load_methods(settings, model)
    cli.check_reached([configured, *(method.config for method in methods)])
    every = evaluation.load_examples(settings, model)
    examples = tasks.first_of_each(every, settings.max_examples)
    evaluation.check_fit(examples, methods, model)
    configs = {method.setting: method.config for method in methods}
    if _DRY_RUN.value:
        _print_plan(settings, model, methods, examples)
        return
    check_start(settings, model, methods, examples)
    if cli.OUTPUT_DIR.value is None:
        raise ValueError("--output_dir says where results go; it is required unless --dry_run is given.")
    command = [os.path.basename(sys.executable), "-m", "experiments.evaluate", *sys.argv[1:]]
    decides = settings.decides() | {"weights": fingerprint(model)}
    lines_of = evaluation.sources(settings, model, methods, examples, every)
    with results.ResultsFile(cli.OUTPUT_DIR.value, decides, lines_of, overwrite=cli.OVERWRITE.value) as file:
        wanted = evaluation.lines_of(methods, examples)
        rows, total = evaluation.evaluate(settings, model, methods, examples, file), len(wanted)
        done = sum(line in file for line in wanted)
        try:
            with tqdm.tqdm(total=total, initial=done, unit="line", smoothing=0.1) as bar:
                for row in rows:
                    bar.set_postfix_str(f"{row['task']} {results.Line.of(row).setting}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            done = sum(line in file for line in wanted)
            cli.interrupted(f"{done} of {total} lines are kept in {file.path}; the same command goes on")
        _write_report(file.rows, command, configs, window_note(model))


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
    summary = summaries.write_summary(
        os.path.join(folder, "summary.json"),
        rows,
        command=command,
        gin_config=gin_config,
        device=jax.devices()[0].device_kind,
    )
    summaries.write_csv(os.path.join(folder, "results.csv"), rows)
    written = ["results.jsonl", "results.csv", "summary.json"]
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
    padding = Padding.of(examples, settings, model)
    evaluator = Evaluator(model, methods, settings.call_tokens, jnp.dtype(settings.cache_dtype))
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.task] = counts.get(example.task, 0) + 1
    lengths = sorted(padding.longest.values())
    print(f"model     {model.config.name}, {settings.dtype}, uncompressed keys and values in {settings.cache_dtype}")
    tasks_line = "examples  " + ", ".join(f"{count} {task}" for task, count in counts.items())
    print(textwrap.fill(tasks_line, 120, subsequent_indent=" " * 10))
    print(f"contexts  up to {lengths[-1]} tokens, up to {padding.most_room} more may follow")
    if note := window_note(model):
        print(textwrap.fill(note, 120, initial_indent="windows   ", subsequent_indent=" " * 10))
    width = max(len(method.setting) for method in methods)
    for length in lengths:
        print(f"cache bytes of {length} tokens, and how many times smaller than a full cache in 16 bits:")
        full = evaluator.full_bytes(length)
        for method in methods:
            size = evaluator.bytes_at_rest(method, length)
            note = "" if method.budget is not None else "  no token budget"
            read = evaluator.bytes_read(method, length)
            if read != size:
                note += f"  a step reads {report.human_bytes(read)}"
            print(f"  {method.setting:<{width}}  {report.human_bytes(size):>9}  {full / size:5.1f}x{note}")
    for method in methods:
        print(f"\n# {method.setting}\n{method.config}", end="")


if __name__ == "__main__":
    cli.start(run)
