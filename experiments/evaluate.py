"""Compresses the cache of a real model, asks it about what it read, and says what that saved and cost.

    python -m experiments.evaluate --gin_file=configs/runs/quickstart.gin --output_dir=out/quickstart

For every example the context is prefilled and compressed without seeing the question (with --question_aware:
after it), the question follows, and the answer is scored under teacher forcing, token by token, so that a method
that acts at every step does so. Greedy decoding gives exactly the answer if and only if each of its tokens is the
most likely one.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import os
import sys
import textwrap
from collections.abc import Sequence

import gin
import jax
import tqdm
from absl import flags

from experiments import bindings, cli, pictures, report, results, tasks
from experiments.calibrations import Calibrations, fingerprint
from experiments.evaluation import Settings, check_fit, evaluate, load_examples, numbered, sources
from experiments.evaluator import Evaluator
from experiments.methods import Method, load_method
from models import Model, load_model

for _name in ("gin_file", "gin_bindings", "model", "methods", "keep", "context", "tasks", "output_dir", "overwrite"):
    flags.declare_key_flag(_name)
_BUDGET = flags.DEFINE_integer("budget", None, "The same in tokens per KV head.")
_MAX_EXAMPLES = flags.DEFINE_integer("max_examples", None, "At most this many examples of each task.")
_QUESTION_AWARE = flags.DEFINE_bool("question_aware", None, "Compress after the question.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would run and how many bytes it would take.")


def read_settings() -> Settings:
    """The settings of the gin files, the bindings and the flags, in that order."""
    if cli.KEEP.value is not None and _BUDGET.value is not None:
        raise ValueError("--keep and --budget say the same thing in two ways; pass one of them.")
    if cli.CONTEXT.value is not None and cli.TASKS.value is not None:
        raise ValueError("--context is for synthetic tasks; those of --tasks have contexts of their own.")
    cli.read_gin()
    given = {
        name: flag.value
        for name, flag in (
            ("model", cli.MODEL),
            ("methods", cli.METHODS),
            ("keep", cli.KEEP),
            ("budget", _BUDGET),
            ("tasks", cli.TASKS),
            ("length", cli.CONTEXT),
            ("max_examples", _MAX_EXAMPLES),
            ("question_aware", _QUESTION_AWARE),
        )
        if flag.value is not None
    }
    if cli.KEEP.value is not None:
        given["budget"] = None
    try:
        settings = Settings(**given)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"Settings: {bindings.explained(error)}") from error
    idle = [name for name in ("synthetic_tasks", "length", "examples", "seed") if name in gin.get_bindings("Settings")]
    if settings.tasks is not None and idle:
        named = ", ".join(f"Settings.{name}" for name in idle)
        print(f"note: {named}: said of synthetic tasks, and those of {settings.tasks} run.", file=sys.stderr)
    return settings


def load_methods(settings: Settings, model: Model) -> list[Method]:
    """`full`, then the other methods in the order given."""
    budget = settings.keep if settings.budget is None else settings.budget
    configs = dict(
        **cli.configs(),
        calibrate=Calibrations(model),
        tokenizer=model.tokenizer,
    )
    return [load_method(name, budget=budget, **configs) for name in dict.fromkeys(["full", *settings.methods])]


def check_start(
    settings: Settings, model: Model, methods: Sequence[Method], examples: Sequence[tasks.Example]
) -> None:
    """Traces every method on the shortest context, where a fractional budget is smallest, before anything runs."""
    evaluator = Evaluator(model, methods, room=1, call_tokens=settings.call_tokens)
    shortest = min(len(example.context_ids) for example in examples)
    for method in methods:
        evaluator.abstract_bytes(method, shortest)


def run() -> None:
    """The program."""
    settings = read_settings()
    configured = gin.operative_config_str()
    model = load_model(settings.model, settings.dtype, int8=settings.int8_weights)
    methods = load_methods(settings, model)
    cli.check_reached([configured, *(method.config for method in methods)])
    every = load_examples(settings, model)
    examples = tasks.first_of_each(every, settings.max_examples)
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
    decides["weights"] = fingerprint(model)
    lines_of = sources(settings, methods, examples, every)
    with results.ResultsFile(cli.OUTPUT_DIR.value, decides, lines_of, overwrite=cli.OVERWRITE.value) as file:
        wanted = {(m.name, example.task, index) for m in methods for index, example in numbered(examples)}
        lines, total = evaluate(settings, model, methods, examples, file), len(wanted)
        try:
            with tqdm.tqdm(total=total, initial=sum(key in file for key in wanted), unit="line", smoothing=0.1) as bar:
                for row in lines:
                    bar.set_postfix_str(f"{row['task']} {row['method']}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            done = sum(key in file for key in wanted)
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
        note = "" if method.transform.schedule.budget is not None else "  no token budget"
        print(f"  {method.name:<{width}}  {report.human_bytes(size):>9}  {sizes[0] / size:5.1f}x smaller{note}")
    for method in methods:
        print(f"\n# {method.name}\n{method.config}", end="")


if __name__ == "__main__":
    cli.start(run)
