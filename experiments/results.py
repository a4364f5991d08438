"""What an evaluation leaves on disk: finished lines that survive an interruption, and a summary.

A run's directory holds `run.json` (the settings that make results comparable, and what the lines of each method and of
each example are of), `results.jsonl` (one line per method and example, each on disk before the next begins) and
`summary.json`. One process at a time writes there.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import datetime
import difflib
import errno
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import reprlib
import shlex
from typing import Any

from experiments.folder_lock import FolderLock

Row = dict[str, Any]

FIELDS = (
    "method",
    "task",
    "example",
    "nll",
    "exact_match",
    "cache_bytes",
    "full_bytes",
    "kept_tokens",
    "prefill_seconds",
    "decode_tokens_per_second",
)
PACKAGES = ("jax", "jaxlib", "numpy", "kvjax")
_GROUPING = ("method", "task", "example")
_FLAGS = ("exact_match", "over_budget")
# What else lines hold; a line may have more, of which nothing is known here.
_NUMBERS = (*FIELDS[3:4], *FIELDS[5:], "kl", "depth", "context_tokens", "budget_tokens")
# What a file system reports when nothing more fits: the disk, the quota, the file-size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Sources:
    """What lines come from: of two runs that go on in one file, what they share must agree.

    Attributes:
      methods: by name, the resolved configuration.
      examples: by (task, index), JSON values that decide its lines, by name; of an example that is not run now perhaps
          fewer than of one that is.
      complete: whether these are all examples, so that lines of others are of examples that are gone.
    """

    methods: Mapping[str, str] = dataclasses.field(default_factory=dict)
    examples: Mapping[tuple[str, int], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    complete: bool = False


class ResultsFile:
    """The lines of `results.jsonl`, earlier and new; only ever appended to.

    Opening keeps the complete lines of an earlier run of the same settings and drops a last line that was cut.
    `(method, task, example) in results` says whether that line is already there.

    Args:
      directory: where the files lie; created where missing.
      settings: JSON values of everything that decides all results (the model and its weights, seed ...), not of
          what only adds lines.
      sources: of the lines to come.
      overwrite: remove what an earlier run left instead of going on with it.

    Raises:
      ValueError: if the directory holds a run of other settings, or lines of a method or an example that has changed,
          or a file that is not such a run's; or if another process writes there.
      OSError: if it cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: Mapping[str, Any],
        sources: Sources = Sources(),
        *,
        overwrite: bool = False,
    ) -> None:
        folder = pathlib.Path(directory)
        self.path = folder / "results.jsonl"
        self._lock = FolderLock(folder)
        try:
            if overwrite:
                for name in ("results.jsonl", "run.json", "summary.json"):
                    (folder / name).unlink(missing_ok=True)
            if self.path.exists() and not (folder / "run.json").exists():
                raise ValueError(f"{folder}: got a results.jsonl without its run.json; {_GO_ON}")
            self.rows, self._end = _complete_lines(self.path)
            _claim(folder, _plain(settings), sources, self.rows)
            self._file = open(self.path, "ab", buffering=0)
            self._file.truncate(self._end)
        except BaseException:
            self._lock.close()
            raise
        self._done = {_key(row) for row in self.rows}

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._lock.close()

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self._done

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line and waits until it is on disk. Numbers that are not finite become null.

        Args:
          row: all of `FIELDS`, and whatever else is worth keeping.

        Raises:
          ValueError: for a row without one of `FIELDS`, or one whose method, task and example are already there.
          OSError: if the line could not be written; the file then ends with the line before.
        """
        missing = [field for field in FIELDS if field not in row]
        if missing:
            raise ValueError(f"row: got no {', '.join(missing)}, expected all of {', '.join(FIELDS)}")
        if _key(row) in self._done:
            raise ValueError(f"row: got {_key(row)} a second time, expected each method, task and example once")
        plain = _plain(row)
        line = json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):  # an unbuffered write may stop early, for example where the disk ends
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._end)
            raise _explained(error, self.path, f"{len(self.rows)} finished lines are kept") from error
        self._end += len(line)
        self.rows.append(plain)
        self._done.add(_key(plain))


def summarise(rows: Iterable[Row]) -> dict[str, Any]:
    """Means over examples, per method and task.

    A mean leaves out nulls and is null where nothing is left. Exact match counts as 0 or 1. `mean` weighs every task
    alike, whatever its number of examples.

    Args:
      rows: lines of `results.jsonl`.

    Returns:
      `{method: {"examples": count, "mean": {field: mean}, "tasks": {task: {"examples": count, "scored": those with an
      answer, field: mean}}}}`, in the order in which methods and tasks first appear.
    """
    grouped: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        grouped.setdefault(row["method"], {}).setdefault(row["task"], []).append(row)
    summary = {}
    for method, by_task in grouped.items():
        tasks = {task: _means(task_rows) for task, task_rows in by_task.items()}
        counts = {
            task: {"examples": len(task_rows), "scored": sum(row["nll"] is not None for row in task_rows)}
            for task, task_rows in by_task.items()
        }
        summary[method] = {
            "examples": sum(len(task_rows) for task_rows in by_task.values()),
            "mean": _means(list(tasks.values())),
            "tasks": {task: counts[task] | means for task, means in tasks.items()},
        }
    return summary


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
    summary = _plain(
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
    _write_atomically(pathlib.Path(path), summary)
    return summary


def _claim(folder: pathlib.Path, settings: dict[str, Any], sources: Sources, rows: Sequence[Row]) -> None:
    """Makes the directory this run's, or checks that it is and adds what this run brings."""
    run = folder / "run.json"
    methods = dict(sources.methods)
    examples = {_name(task, index): _plain(example) for (task, index), example in sources.examples.items()}
    earlier_methods, earlier_examples = {}, {}
    if run.exists():
        try:
            earlier = json.loads(run.read_text(encoding="utf-8"))
            earlier_settings = earlier["settings"]
            known = "methods" in earlier
            earlier_methods, earlier_examples = earlier.get("methods", {}), earlier.get("examples", {})
            mappings = (earlier_settings, earlier_methods, earlier_examples, *earlier_examples.values())
            if not all(isinstance(each, dict) for each in mappings):
                raise TypeError
            if not all(isinstance(each, str) for each in earlier_methods.values()):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{run}: got a file that is not the settings of an evaluation; {_GO_ON}") from None
        if not known:
            raise ValueError(
                f"{folder}: holds results of an earlier version, which do not say what they are of; {_GO_ON}"
            )
        changes = _changes(earlier_settings, settings)
        if changes:
            raise ValueError(f"{folder}: holds results of other settings ({changes}); {_GO_ON}")
    for method in dict.fromkeys(row["method"] for row in rows):
        if method in methods and methods[method] != earlier_methods.get(method):
            changes = _changed_lines(earlier_methods.get(method, ""), methods[method])
            raise ValueError(f"{folder}: holds results of another {method} ({changes}); {_GO_ON}")
    for task, index in dict.fromkeys((row["task"], row["example"]) for row in rows):
        name = _name(task, index)
        if name not in examples and sources.complete:
            raise ValueError(f"{folder}: holds results of example {name}, which the tasks no longer have; {_GO_ON}")
        was = earlier_examples.get(name, {})
        changes = _changes(was, {**was, **examples.get(name, {})})
        if changes:
            raise ValueError(f"{folder}: holds results of another example {name} ({changes}); {_GO_ON}")
    for name, example in examples.items():
        earlier_examples[name] = earlier_examples.get(name, {}) | example
    about = {"settings": settings, "methods": earlier_methods | methods, "examples": earlier_examples}
    _write_atomically(run, about)


_GO_ON = "pass another --output_dir, or --overwrite to start afresh"


def _name(task: str, index: int) -> str:
    return f"{task}/{index}"


def _changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between JSON values by name; empty where nothing does."""
    return "; ".join(
        f"{name} was {reprlib.repr(was.get(name))} and is {reprlib.repr(now.get(name))}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    )


def _changed_lines(was: str, now: str) -> str:
    lines = difflib.unified_diff(was.splitlines(), now.splitlines(), lineterm="", n=0)
    return "; ".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def _complete_lines(path: pathlib.Path) -> tuple[list[Row], int]:
    """The lines that end with a line break, and the byte after the last of them."""
    rows, end = [], 0
    first: dict[tuple[Any, ...], int] = {}
    content = path.read_bytes() if path.exists() else b""
    for number, raw in enumerate(content.split(b"\n")[:-1], start=1):  # what follows the last line break was cut
        where = f"{path}, line {number}"
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: got {raw[:40]!r}, expected a line of results; {_GO_ON}") from None
        if not isinstance(row, dict) or not set(_GROUPING) <= set(row):
            raise ValueError(f"{where}: got {raw[:40]!r}, expected a line of results; {_GO_ON}")
        for field in FIELDS:
            if field not in row:
                raise ValueError(f"{where}: got no {field}, expected all of {', '.join(FIELDS)}; {_GO_ON}")
        for field, value in row.items():
            wanted = _expected(field, value)
            if wanted is not None:
                raise ValueError(f"{where}: {field}: got {reprlib.repr(value)}, expected {wanted}; {_GO_ON}")
        if _key(row) in first:
            raise ValueError(
                f"{where}: got {row['method']}, {row['task']}, {row['example']} again, as in line {first[_key(row)]}, "
                f"expected each once; {_GO_ON}"
            )
        first[_key(row)] = number
        rows.append(row)
        end += len(raw) + 1
    return rows, end


def _expected(field: str, value: Any) -> str | None:
    """What a field of a line must hold where the value is something else; None where it fits, or nothing is known."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if field in ("method", "task"):
        return None if isinstance(value, str) and value else "a name"
    if field == "example":
        return None if whole and value >= 0 else "a whole number"
    if field in _FLAGS:
        return None if value is None or isinstance(value, bool) else "true, false or null"
    if field in _NUMBERS:
        fits = value is None or whole or isinstance(value, float) and math.isfinite(value)
        return None if fits else "a number or null"
    return None


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field] for field in _GROUPING)


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    fields = dict.fromkeys(field for row in rows for field in row if field not in _GROUPING)
    means: dict[str, float | None] = {}
    for field in fields:
        values = [row[field] for row in rows if row.get(field) is not None]
        if all(isinstance(value, (bool, int, float)) for value in values):
            means[field] = math.fsum(values) / len(values) if values else None
    return means


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: array scalars as numbers, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_atomically(path: pathlib.Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _explained(error, path, "the file is as it was before") from error


def _explained(error: OSError, path: pathlib.Path, state: str) -> OSError:
    if error.errno in _FULL:
        return OSError(error.errno, f"no space left; {state}; make room and run the same command again", str(path))
    return OSError(error.errno, f"{error.strerror}; {state}", str(path))
