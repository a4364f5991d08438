"""Lines of results summed up: means with standard errors, a summary as JSON, and a table for other programs."""

import csv
import datetime
import importlib.metadata
import math
import os
import pathlib
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.results import Line, Row, plain, setting, write_atomically

PACKAGES = ("jax", "jaxlib", "numpy", "kvjax")
ERROR = "_stderr"
"""Suffix of the fields that hold standard errors."""


class Group(NamedTuple):
    """Lines that are averaged: those of a method at one budget, one `read` and one length of context."""

    method: str
    keep: float | None
    budget: int | None
    length: int | None
    read: float | int | None = None

    @classmethod
    def of(cls, row: Row) -> "Group":
        """The group that a line belongs to."""
        line = Line.of(row)
        return cls(line.method, line.keep, line.budget, line.length, line.read)

    @property
    def setting(self) -> str:
        """The method and what it was told to keep, and to read."""
        return setting(self.method, self.keep, self.budget, self.read)


def summarise(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Averages over examples, by method, budget, length of context and task.

    A mean leaves out nulls and is null where nothing is left. A standard error is the sample's standard deviation over
    `sqrt(n)`, null for fewer than two values; that of a mean over tasks is `sqrt(sum(e_i^2)) / tasks`, null where one
    of them is. True and false count as 1 and 0. `mean` weighs every task alike, whatever its number of examples.

    Args:
      rows: lines of `results.jsonl`.

    Returns:
      `{name: {"method", "keep", "budget", "length", "examples": count, "mean": {field: mean, field_stderr: error},
      "tasks": {task: {"examples": count, "scored": those with an answer, field: mean, field_stderr: error}}}}`: first
      by length, then in the order in which groups appear. A name is the method's, with budget or length where there
      are several in these rows.
    """
    grouped: dict[Group, dict[str, list[Row]]] = {}
    for row in rows:
        grouped.setdefault(Group.of(row), {}).setdefault(row["task"], []).append(row)
    summary = {}
    ordered = sorted(grouped, key=lambda group: group.length or 0)
    for group, name in zip(ordered, group_names(ordered)):
        by_task = grouped[group]
        tasks = {task: _means(task_rows) for task, task_rows in by_task.items()}
        counts = {
            task: {
                "examples": len(task_rows),
                "scored": sum(row["nll"] is not None or row.get("score") is not None for row in task_rows),
            }
            for task, task_rows in by_task.items()
        }
        summary[name] = {
            **group._asdict(),
            "examples": sum(len(task_rows) for task_rows in by_task.values()),
            "mean": _mean_of_means(list(tasks.values())),
            "tasks": {task: counts[task] | means for task, means in tasks.items()},
        }
    return summary


def group_names(groups: Iterable[Group]) -> list[str]:
    """Names groups by their methods, with budget or length where there are several among these."""
    groups = list(groups)
    lengths = {group.length for group in groups}
    budgets = {(group.keep, group.budget) for group in groups} - {(None, None)}
    reads = {group.read for group in groups} - {None}
    told = lambda of: of._replace(
        **({} if len(budgets) > 1 else {"keep": None, "budget": None}), **({} if len(reads) > 1 else {"read": None})
    )
    names = [told(group).setting for group in groups]
    if len(lengths) > 1:
        names = [f"{name} length={of.length}" if of.length is not None else name for name, of in zip(names, groups)]
    return names


def write_summary(
    path: str | os.PathLike[str],
    rows: Iterable[Row],
    *,
    command: Sequence[str],
    gin_config: str,
    device: str,
) -> dict[str, Any]:
    """Writes `summary.json` in one step: a reader sees the old file or the new one, never a part.

    Args:
      path: of the file.
      rows: lines of `results.jsonl`.
      command: the arguments that started the program, its own name first.
      gin_config: the resolved configuration as gin prints it.
      device: what the model ran on, for example "cpu" or "NVIDIA H100 80GB HBM3".

    Returns:
      What was written; `methods` holds `summarise(rows)`.

    Raises:
      OSError: if it cannot be written; an earlier file is then unchanged.
    """
    summary = plain(
        {
            "command": shlex.join(command),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "machine": {
                "platform": platform.platform(),
                "processor": platform.machine(),
                "cpus": os.cpu_count(),
                "device": device,
            },
            "methods": summarise(rows),
            "gin_config": gin_config,
        }
    )
    write_atomically(pathlib.Path(path), summary)
    return summary


def write_csv(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes the lines as a table with a header, one column a field, for `pandas.read_csv` and spreadsheets.

    Args:
      path: of the file.
      rows: lines of `results.jsonl`; null becomes an empty cell.
    """
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the mean, null of nothing, and its standard error, null of fewer than two values."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    """Means and standard errors of what is a number in all rows that have it."""
    fields = dict.fromkeys(field for row in rows for field in row if field not in Line._fields)
    means: dict[str, float | None] = {}
    for field in fields:
        values = [row[field] for row in rows if row.get(field) is not None]
        if all(isinstance(value, (bool, int, float)) for value in values):
            means[field], means[field + ERROR] = mean_and_error(values)
    return means


def _mean_of_means(tasks: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean over tasks of their means, with the standard error that follows from theirs."""
    fields = dict.fromkeys(field for task in tasks for field in task if not field.endswith(ERROR))
    means: dict[str, float | None] = {}
    for field in fields:
        having = [task for task in tasks if task.get(field) is not None]
        errors = [task.get(field + ERROR) for task in having]
        means[field] = math.fsum(task[field] for task in having) / len(having) if having else None
        known = having and None not in errors
        means[field + ERROR] = math.sqrt(math.fsum(error**2 for error in errors)) / len(having) if known else None
    return means


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
