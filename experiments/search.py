"""Looks for the best composition of methods at a wanted size, by successive halving on a real model.

    python -m experiments.search --model=smollm2 --target_ratio=8 --output_dir=out/search

Every method that selects tokens is combined with every method that stores them in fewer bytes, and set to keep as many
tokens as the wanted size allows. All are tried on one example of each task; the better half goes on to twice as many
examples, until one is left. What counts is the KL divergence from the full cache's predictions of the answers. The
configs of the methods that no other beats on bytes and KL are written to OUTPUT_DIR/front, ready for configs/methods.

Source of the halving: Jamieson and Talwalkar, Non-stochastic best arm identification (2016).
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tqdm
from absl import flags

from experiments import cli, evaluation, pictures, report, results, summaries, tasks
from experiments.benchmarks import sources as task_sources
from experiments.calibrations import Calibrations, fingerprint
from experiments.compositions import compose_configs, has_budget, keep_for_ratio
from experiments.evaluator import Evaluator
from experiments.methods import METHODS_DIR, Method, check_method_names, load_method
from models import Model

for _name in ("model", "tasks", "examples", "task_seed", "dtype", "batch", "mesh", "output_dir", "overwrite"):
    flags.declare_key_flag(_name)
_RATIO = flags.DEFINE_float("target_ratio", 8.0, "How many times smaller than the full cache.")
_SELECT = flags.DEFINE_list(
    "select", ["kvzip", "keydiff", "expected_attention", "adakv_snapkv", "kvmerger"], "Methods that select tokens."
)
_STORE = flags.DEFINE_list("store", ["fp8", "int8", "int4", "int2", "million", "gear"], "Methods that store them.")
_LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a synthetic context.")
_MOST = 4  # examples of each task that the last two compete on, without --examples
_INSTALL = flags.DEFINE_string("install", None, "Write the winner to configs/methods under this name.")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A composition, and how it was set to the wanted size.

    Attributes:
      method: it, built.
      text: its config.
      ratio: of bytes to the full cache's, from shapes.
    """

    method: Method
    text: str
    ratio: float


def candidates(
    model: Model,
    evaluator: Evaluator,
    full: Method,
    length: int,
    ratio: float,
    select: Sequence[str],
    store: Sequence[str],
) -> tuple[list[Candidate], list[str]]:
    """The compositions that reach the ratio, and why others were left out."""
    full_bytes = evaluator.full_bytes(length)
    calibrate = Calibrations(model)
    found, refused = [], []
    pairs = [*itertools.product(select, store), *((name,) for name in (*select, *store))]
    for names in tqdm.tqdm(pairs, desc="setting budgets", unit="composition", leave=False):
        title = "_".join(names)
        try:
            text = compose_configs(names)
            build = lambda keep: load_method(
                title, budget=keep, calibrate=calibrate, tokenizer=model.tokenizer, text=text
            )
            size = lambda keep: evaluator.bytes_at_rest(build(keep), length)
            keep = keep_for_ratio(size, full_bytes, ratio) if has_budget(text) else 0.5
            if keep is None or size(keep) * ratio > full_bytes * 1.001:
                refused.append(f"{title}: not {ratio:g} times smaller")
                continue
            fixed = text.replace("%budget", repr(keep))
            method = dataclasses.replace(build(keep), budget=None)  # each has its own, so its name is enough
            found.append(Candidate(method, fixed, full_bytes / size(keep)))
        except (ValueError, TypeError) as error:
            refused.append(f"{title}: {str(error).splitlines()[0]}")
    return found, refused


def halve(entries: Sequence[Candidate], losses: dict[str, float]) -> list[Candidate]:
    """The better half, rounded up; ties in the order given."""
    ordered = sorted(entries, key=lambda entry: losses[entry.method.name])
    return ordered[: math.ceil(len(ordered) / 2)]


def run() -> None:
    """The program."""
    if cli.OUTPUT_DIR.value is None:
        raise ValueError("--output_dir says where results go; it is required.")
    if not 1 < _RATIO.value < math.inf:
        raise ValueError(f"--target_ratio must be above 1 and finite, got {_RATIO.value:g}.")
    count = _MOST if cli.EXAMPLES.value is None else cli.EXAMPLES.value
    if count < 1:
        raise ValueError(f"--examples must be at least 1, got {count}.")
    check_method_names(_SELECT.value, "--select")
    check_method_names(_STORE.value, "--store")
    if _INSTALL.value is not None and not _INSTALL.value.isidentifier():
        raise ValueError(f"--install must be a name like kvzip_int4, got {_INSTALL.value!r}.")
    if _INSTALL.value is not None and (METHODS_DIR / f"{_INSTALL.value}.gin").exists():
        raise ValueError(f"--install: configs/methods/{_INSTALL.value}.gin is there already; choose another name.")
    settings = evaluation.Settings(
        model=cli.MODEL.value or "smollm2",
        methods=("full",),
        tasks=task_sources.split(cli.TASKS.value or "synthetic"),
        length=_LENGTH.value,
        examples=count,
        max_examples=count,
        seed=cli.TASK_SEED.value,
        **{flag.name: flag.value for flag in (cli.DTYPE, cli.BATCH, cli.MESH) if flag.value is not None},
    )
    with evaluation.loaded(settings) as model:
        _run(settings, model)


def _run(settings: evaluation.Settings, model: Model) -> None:
    full = load_method("full", budget=0.5)
    every = evaluation.load_examples(settings, model)
    examples = tasks.first_of_each(every, settings.max_examples)
    for index, example in evaluation.numbered(examples):
        if not example.answer_ids:
            raise ValueError(
                f"--tasks: example {index} ({example.task}) has no answer, whose predictions a search compares."
            )
    evaluation.check_fit(examples, [full], model)
    longest = max(len(example.context_ids) for example in examples)
    evaluator = Evaluator(model, [full], settings.call_tokens, jnp.dtype(settings.cache_dtype))
    left, refused = candidates(model, evaluator, full, longest, _RATIO.value, _SELECT.value, _STORE.value)
    for why in refused:
        print(f"left out  {why}", file=sys.stderr)
    if not left:
        raise ValueError(f"--target_ratio: no composition is {_RATIO.value:g} times smaller than the full cache.")
    tried = {entry.method.name: entry for entry in left}
    decides = settings.decides() | {"target_ratio": _RATIO.value, "weights": fingerprint(model)}
    lines_of = evaluation.sources(settings, model, [full, *(entry.method for entry in left)], examples, every)
    with results.ResultsFile(cli.OUTPUT_DIR.value, decides, lines_of, overwrite=cli.OVERWRITE.value) as file:
        try:
            winner = _compete(settings, model, full, left, examples, file)
        except KeyboardInterrupt:
            cli.interrupted(f"{len(file.rows)} lines are kept in {file.path}; the same command goes on")
        _write(winner, tried, file.rows)


def _compete(settings, model, full, left: list[Candidate], examples, file) -> Candidate:
    """Rounds with twice as many examples each, until one candidate is left."""
    by_task: dict[str, list] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    padding = evaluation.Padding.of(examples, settings, model)  # the same in all rounds
    count = 1
    while True:
        some = [example for each in by_task.values() for example in each[:count]]
        methods = [full, *(entry.method for entry in left)]
        lines = evaluation.evaluate(settings, model, methods, some, file, padding)
        total = sum(line not in file for line in evaluation.lines_of(methods, some))
        with tqdm.tqdm(lines, desc=f"{len(left)} left", total=total, unit="line") as bar:
            for row in bar:
                bar.set_postfix_str(f"{row['task']} {row['method']}", refresh=False)
        losses = {name: entry["mean"]["kl"] for name, entry in summaries.summarise(file.rows).items()}
        left = halve(left, losses)
        if len(left) == 1:
            return left[0]
        count = min(2 * count, settings.max_examples)


def _write(winner: Candidate, tried: dict[str, Candidate], rows: list[results.Row]) -> None:
    """The table, the picture and the configs of the front."""
    folder = pathlib.Path(cli.OUTPUT_DIR.value)
    command = [os.path.basename(sys.executable), "-m", "experiments.search", *sys.argv[1:]]
    config = "\n".join(f"# {name}\n{entry.text}" for name, entry in tried.items())
    device = jax.devices()[0].device_kind
    summary = summaries.write_summary(folder / "summary.json", rows, command=command, gin_config=config, device=device)
    methods = summary["methods"]
    pictures.plot_pareto(methods, folder / "pareto.png")
    names = [name for name in methods if name in tried]
    points = [(methods[name]["mean"]["cache_bytes"], -methods[name]["mean"]["kl"]) for name in names]
    front = sorted({names[i] for i in report.pareto_front(points)} | {winner.method.name})
    (folder / "front").mkdir(exist_ok=True)
    for name in front:
        (folder / "front" / f"{name}.gin").write_text(_config_file(tried[name], methods[name], command), "utf-8")
    print(report.table(methods))
    loss = methods[winner.method.name]["mean"]["kl"]
    print(f"\nThe winner at {_RATIO.value:g} times fewer bytes: {winner.method.name}, KL to the full cache {loss:.3f}.")
    print(f"Its config and those of the front are in {folder / 'front'}.")
    if _INSTALL.value is not None:
        path = METHODS_DIR / f"{_INSTALL.value}.gin"
        path.write_text(_config_file(winner, methods[winner.method.name], command), encoding="utf-8")
        print(f"It is installed as {path}: --methods={_INSTALL.value} finds it.")


def _config_file(entry: Candidate, measured: dict, command: Sequence[str]) -> str:
    mean = measured["mean"]
    return (
        f"# {entry.method.name}: found by `{' '.join(command)}`.\n"
        f"# {report.times_smaller(mean):.1f} times fewer bytes than the full cache, KL {mean['kl']:.4f} to it, over "
        f"{measured['examples']} examples.\n\n{entry.text}"
    )


if __name__ == "__main__":
    cli.start(run)
