"""The finished lines of an evaluation, on disk, where they survive an interruption.

A run's directory holds `run.json` (the settings that make results comparable, and what the lines of each method and of
each example are of) and `results.jsonl` (one line per method, budget and example, each on disk before the next begins).
One process at a time writes there.
"""

import dataclasses
import difflib
import errno
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.folder_lock import FolderLock

Row = dict[str, Any]


class Line(NamedTuple):
    """Which line of the results: the fields that no two lines share.

    Attributes:
      method: its name.
      task: its name.
      example: number among those of its task and length.
      length: tokens of context that the task was made for; None: the task has contexts of its own.
      keep: the fraction of the context that the method was told to keep; None: no fraction was.
      budget: the same in tokens per KV head.
      read: what a step was told to read, as a fraction of the context or, an int, in tokens; None: it was told nothing.
    """

    method: str
    task: str
    example: int
    length: int | None = None
    keep: float | None = None
    budget: int | None = None
    read: float | int | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Line":
        """Reads the fields of a row; those that it lacks are None."""
        return cls(*(row.get(field) for field in cls._fields))

    @property
    def setting(self) -> str:
        """The method and what it was told: "snapkv keep=0.25", "snapkv budget=256", "quest read=0.125", "full"."""
        return setting(self.method, self.keep, self.budget, self.read)


def setting(method: str, keep: float | None, budget: int | None, read: float | int | None = None) -> str:
    """Names a method with what it was told to keep, and to read at a step."""
    told = {"keep": keep, "budget": budget, "read": read}
    return method + "".join(f" {name}={value}" for name, value in told.items() if value is not None)


FIELDS = (
    *("method", "task", "example", "length", "keep", "budget"),
    "nll",
    "exact_match",
    "score",
    "metric",
    "prediction",
    "cache_bytes",
    "full_bytes",
    "kept_tokens",
    "prefill_seconds",
    "decode_tokens_per_second",
)
"""Fields of every line: see docs/evaluating.md."""
_FLAGS = ("exact_match", "over_budget")
_TEXTS = ("metric", "prediction")
# What else lines hold; a line may have more, of which nothing is known here.
_NUMBERS = (
    *("keep", "budget", "read", "length", "nll", "score", "cache_bytes", "full_bytes", "read_bytes", "allocated_bytes"),
    "kept_tokens",
    *("prefill_seconds", "decode_tokens_per_second", "kl", "depth", "context_tokens", "budget_tokens"),
)
# What a file system reports when nothing more fits: the disk, the quota, the file-size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Sources:
    """What lines come from: of two runs that go on in one file, what they share must agree.

    Attributes:
      methods: by name with what it keeps (`Line.setting`), the resolved configuration.
      examples: by (task, length, index), JSON values that decide its lines, by name; of an example that is not run now
          perhaps fewer than of one that is.
      growing: tasks of which there may be more examples than these; lines of other tasks' examples that are not here
          are of examples that are gone. None: all tasks.
    """

    methods: Mapping[str, str] = dataclasses.field(default_factory=dict)
    examples: Mapping[tuple[str, int | None, int], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    growing: Collection[str] | None = None


class ResultsFile:
    """The lines of `results.jsonl`, earlier and new; only ever appended to.

    Opening keeps the complete lines of an earlier run of the same settings and drops a last line that was cut.
    `Line(...) in results` says whether that line is already there.

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
            self.rows, self._end = _complete_lines(self.path, _GO_ON)
            _claim(folder, plain(settings), sources, self.rows)
            self._file = open(self.path, "ab", buffering=0)
            self._file.truncate(self._end)
        except BaseException:
            self._lock.close()
            raise
        self._done = {Line.of(row) for row in self.rows}

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._lock.close()

    def __contains__(self, line: Line) -> bool:
        return line in self._done

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line and waits until it is on disk. Numbers that are not finite become null.

        Args:
          row: all of `FIELDS`, and whatever else is worth keeping.

        Raises:
          ValueError: for a row without one of `FIELDS`, or one whose `Line` is already there.
          OSError: if the line could not be written; the file then ends with the line before.
        """
        missing = [field for field in FIELDS if field not in row]
        if missing:
            raise ValueError(f"row: got no {', '.join(missing)}, expected all of {', '.join(FIELDS)}")
        if Line.of(row) in self._done:
            raise ValueError(f"row: got {Line.of(row)} a second time, expected each once")
        values = plain(row)
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):  # an unbuffered write may stop early, for example where the disk ends
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._end)
            raise _explained(error, self.path, f"{len(self.rows)} finished lines are kept") from error
        self._end += len(line)
        self.rows.append(values)
        self._done.add(Line.of(values))


def _claim(folder: pathlib.Path, settings: dict[str, Any], sources: Sources, rows: Sequence[Row]) -> None:
    """Makes the directory this run's, or checks that it is and adds what this run brings."""
    run = folder / "run.json"
    methods = dict(sources.methods)
    examples = {example_name(*which): plain(example) for which, example in sources.examples.items()}
    earlier_methods, earlier_examples = {}, {}
    if run.exists():
        earlier_settings, earlier_methods, earlier_examples = _about(run, _GO_ON)
        changes = _changes(earlier_settings, settings)
        if changes:
            raise ValueError(f"{folder}: holds results of other settings ({changes}); {_GO_ON}")
    for method in dict.fromkeys(Line.of(row).setting for row in rows):
        if method in methods and methods[method] != earlier_methods.get(method):
            changes = _changed_lines(earlier_methods.get(method, ""), methods[method])
            raise ValueError(f"{folder}: holds results of another {method} ({changes}); {_GO_ON}")
    lines = {example_name(line.task, line.length, line.example): line.task for line in map(Line.of, rows)}
    for name, task in lines.items():
        if name not in examples and sources.growing is not None and task not in sources.growing:
            raise ValueError(f"{folder}: holds results of example {name}, which the tasks no longer have; {_GO_ON}")
        was = earlier_examples.get(name, {})
        changes = _changes(was, {**was, **examples.get(name, {})})
        if changes:
            raise ValueError(f"{folder}: holds results of another example {name} ({changes}); {_GO_ON}")
    for name, example in examples.items():
        earlier_examples[name] = earlier_examples.get(name, {}) | example
    about = {"settings": settings, "methods": earlier_methods | methods, "examples": earlier_examples}
    write_atomically(run, about)


_GO_ON = "pass another --output_dir, or --overwrite to start afresh"


def _about(run: pathlib.Path, advice: str) -> tuple[dict[str, Any], dict[str, str], dict[str, dict[str, Any]]]:
    """The settings, methods and examples that a run.json holds."""
    try:
        earlier = json.loads(run.read_text(encoding="utf-8"))
        settings, known = earlier["settings"], "methods" in earlier
        methods, examples = earlier.get("methods", {}), earlier.get("examples", {})
        if not all(isinstance(each, dict) for each in (settings, methods, examples, *examples.values())):
            raise TypeError
        if not all(isinstance(each, str) for each in methods.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{run}: got a file that is not the settings of an evaluation; {advice}") from None
    if not known:
        raise ValueError(
            f"{run.parent}: holds results of an earlier version, which do not say what they are of; {advice}"
        )
    return settings, methods, examples


@dataclasses.dataclass(frozen=True)
class Folder:
    """Holds what an evaluation left in a folder.

    Attributes:
      path: of the folder.
      rows: lines of `results.jsonl`.
      settings: what decides all results.
      methods: by name with what it keeps, the resolved configuration.
      examples: by name (`example_name`), what decides its lines.
    """

    path: pathlib.Path
    rows: Sequence[Row]
    settings: Mapping[str, Any]
    methods: Mapping[str, str]
    examples: Mapping[str, Mapping[str, Any]]


def read_folder(path: str | os.PathLike[str]) -> Folder:
    """Reads what an evaluation left in a folder, and changes nothing there.

    Raises:
      ValueError: there is no evaluation, not a finished line of one, or files that are not one's.
    """
    folder, advice = pathlib.Path(path), "run the evaluation again"
    if not (folder / "run.json").is_file() or not (folder / "results.jsonl").is_file():
        raise ValueError(f"{folder}: got no run.json and results.jsonl, expected the output_dir of an evaluation")
    rows, _ = _complete_lines(folder / "results.jsonl", advice)
    if not rows:
        raise ValueError(f"{folder}: got no finished line in results.jsonl; {advice}")
    return Folder(folder, rows, *_about(folder / "run.json", advice))


def example_name(task: str, length: int | None, index: int) -> str:
    """Names an example: "needles/1024/0", or "mine/0" where its context has a length of its own."""
    return f"{task}/{index}" if length is None else f"{task}/{length}/{index}"


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


def _complete_lines(path: pathlib.Path, advice: str) -> tuple[list[Row], int]:
    """The lines that end with a line break, and the byte after the last of them."""
    rows, end = [], 0
    first: dict[Line, int] = {}
    content = path.read_bytes() if path.exists() else b""
    for number, raw in enumerate(content.split(b"\n")[:-1], start=1):  # what follows the last line break was cut
        where = f"{path}, line {number}"
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: got {raw[:40]!r}, expected a line of results; {advice}") from None
        if not isinstance(row, dict) or not {"method", "task", "example"} <= set(row):
            raise ValueError(f"{where}: got {raw[:40]!r}, expected a line of results; {advice}")
        for field in FIELDS:
            if field not in row:
                raise ValueError(f"{where}: got no {field}, expected all of {', '.join(FIELDS)}; {advice}")
        for field, value in row.items():
            wanted = _expected(field, value)
            if wanted is not None:
                raise ValueError(f"{where}: {field}: got {reprlib.repr(value)}, expected {wanted}; {advice}")
        line = Line.of(row)
        if line in first:
            name = example_name(line.task, line.length, line.example)
            raise ValueError(
                f"{where}: got {line.setting}, {name} again, as in line {first[line]}, expected each once; {advice}"
            )
        first[line] = number
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
    if field in _TEXTS:
        return None if value is None or isinstance(value, str) else "a text or null"
    if field in _FLAGS:
        return None if value is None or isinstance(value, bool) else "true, false or null"
    if field in _NUMBERS:
        fits = value is None or whole or isinstance(value, float) and math.isfinite(value)
        return None if fits else "a number or null"
    return None


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: array scalars as numbers, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomically(path: pathlib.Path, value: Any) -> None:
    """Writes JSON in one step: a reader sees the old file or the new one, never a part.

    Raises:
      OSError: if it cannot be written; an earlier file is then unchanged.
    """
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
