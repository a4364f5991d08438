"""A summary as a table that a person reads at a glance."""

import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.results import Row
from experiments.summaries import ERROR

_GAP = "  "
_TITLES = 3  # lines above the cells of a column


def table(summary: Mapping[str, Any], *, full: str = "full", width: int | None = None) -> str:
    """Tabulates what each cache takes and what that costs: first over all tasks, then by task.

    A row is a method, at one budget and one length of context where there are several. Behind a mean stands its
    standard error in parentheses, where it has one.

    Args:
      summary: what `summaries.summarise` returned.
      full: the method with the full cache, which decode speed and KL are relative to.
      width: columns to fill; None takes the terminal's, or 120 where there is none. Tasks that do not fit go to
          further tables below.

    Returns:
      Lines of plain ASCII, without a line break at the end.
    """
    if not summary:
        raise ValueError("summary: got no methods, expected at least one")
    width = width or shutil.get_terminal_size((120, 24)).columns
    entries = list(summary.values())
    means = [entry["mean"] for entry in entries]
    front = _front(entries)
    first = _labels(entries, front)
    speeds = {_whose(entry): entry["mean"]["decode_tokens_per_second"] for entry in entries if _is(entry, full)}

    columns = [
        _column("", "", "cache", cells=[human_bytes(mean["cache_bytes"]) for mean in means]),
        _column("", "times", "smaller", cells=[_fixed(times_smaller(mean), 1, "x") for mean in means]),
        _column("", "tokens", "kept", cells=[_fixed(mean["kept_tokens"], 0) for mean in means]),
    ]
    if any(entry.get("read") is not None for entry in entries):
        columns.append(_column("", "read at", "a step", cells=[human_bytes(mean.get("read_bytes")) for mean in means]))
    if any(speeds.values()):
        ratios = [_ratio(e["mean"]["decode_tokens_per_second"], speeds.get(_whose(e))) for e in entries]
        columns.append(_column("", "decode", "speed", cells=[_fixed(ratio, 2, "x") for ratio in ratios]))
    if any(mean.get("kl") is not None for mean in means):
        columns.append(_column("", "KL to", full, cells=[_fixed(mean.get("kl"), 3) for mean in means]))
    tasks = list(dict.fromkeys(task for entry in entries for task in entry["tasks"]))
    by_task = [_quality(task, [entry["tasks"].get(task, {}) for entry in entries]) for task in tasks]
    if len(tasks) == 1:
        blocks = _packed(first, [*columns, *by_task], width)
    else:
        blocks = _packed(first, [*columns, _quality("all_tasks", means)], width) + _packed(first, by_task, width)
    gaps = [i for i in range(1, len(entries)) if entries[i].get("length") != entries[i - 1].get("length")]
    parts = [*(_rows(block, gaps) for block in blocks), _notes(summary, full, bool(front), width)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def human_bytes(count: float | None) -> str:
    """`count` with a binary unit and three digits: 512 B, 1.50 KiB, 94.4 MiB."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log2(count)) // 10, 4)
    value = count / 1024**power
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {'KMGT'[power - 1]}iB"


def times_smaller(mean: Row) -> float | None:
    """How many times the cache of a method fits into the full one; None where either is unknown."""
    return mean["full_bytes"] / mean["cache_bytes"] if mean["cache_bytes"] and mean["full_bytes"] else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats: none has less cost and as much quality, or as much cost and more quality.

    Args:
      points: (cost, quality) pairs; less cost and more quality are better.

    Returns:
      Their indices by growing cost. Equal points are all in, or all out.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1] or tuple(points[i]) == tuple(points[front[-1]]):
            front.append(i)
    return front


def _is(entry: Mapping[str, Any], method: str) -> bool:
    return entry.get("method") == method


def _whose(entry: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """The run, where there are several, and the length of context."""
    return entry.get("run"), entry.get("length")


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def _front(entries: Sequence[Mapping[str, Any]]) -> set[int]:
    """The entries that no other of the same length beats on both bytes and quality: the score, or else the nll."""
    front: set[int] = set()
    for length in {entry.get("length") for entry in entries}:
        which = [i for i, entry in enumerate(entries) if entry.get("length") == length]
        for field, sign in (("score", 1), ("nll", -1)):
            points = [(entries[i]["mean"]["cache_bytes"], entries[i]["mean"].get(field)) for i in which]
            if all(value is not None for point in points for value in point):
                front |= {which[j] for j in pareto_front([(size, sign * quality) for size, quality in points])}
                break
    return front


def _labels(entries: Sequence[Mapping[str, Any]], front: set[int]) -> list[list[str]]:
    """The columns that name a row: the method; its budget and length, where there are several."""
    names = [f"{'*' if i in front else ' '} {_name(entry)}" for i, entry in enumerate(entries)]
    columns = [_column("", "", "  method", cells=names, left=True)]
    budgets = [entry.get("keep") if entry.get("keep") is not None else entry.get("budget") for entry in entries]
    if len({budget for budget in budgets if budget is not None}) > 1:
        title = "keep" if any(isinstance(budget, float) for budget in budgets) else "budget"
        columns.append(_column("", "", title, cells=["-" if b is None else f"{b:g}" for b in budgets]))
    reads = [entry.get("read") for entry in entries]
    if len({read for read in reads if read is not None}) > 1:
        columns.append(_column("", "", "read", cells=["-" if read is None else f"{read:g}" for read in reads]))
    lengths = [entry.get("length") for entry in entries]
    if len(set(lengths)) > 1:
        columns.append(_column("", "", "context", cells=["own" if n is None else str(n) for n in lengths]))
    return columns


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['run']}: {entry['method']}" if "run" in entry else entry["method"]


def _packed(first: Sequence[list[str]], columns: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """Blocks of columns that fit beside the first ones, at least one a block."""
    blocks = [[*first]]
    for column in columns:
        used = sum(len(other[0]) + len(_GAP) for other in blocks[-1])
        if len(blocks[-1]) > len(first) and used + len(column[0]) > width:
            blocks.append([*first])
        blocks[-1].append(column)
    return blocks


def _quality(task: str, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The column of a task: score and nll with their errors; nll and perplexity where nothing has a score."""
    cuts = [i for i, character in enumerate(task) if character == "_" and 0 < i < len(task) - 1]
    cut = min(cuts, key=lambda i: max(i, len(task) - 1 - i), default=None)
    above, below = ("", task) if cut is None else (task[:cut], task[cut + 1 :])
    nlls = _with_errors(cells, "nll", lambda value: f"{value:.2f}")
    if all(cell.get("score") is None for cell in cells):
        known = [cell.get("nll") for cell in cells]
        shown = ["-" if nll is None else f"{math.exp(nll):.1f}" if nll < 100 else "inf" for nll in known]
        wide, width = max(map(len, nlls)), max(3, *map(len, shown))
        cells = [f"{a:>{wide}} {b:>{width}}" for a, b in zip(nlls, shown)]
        return _column(above, below, f"nll {'ppl':>{width}}", cells=cells)
    scores = _with_errors(cells, "score", lambda value: f"{100 * value:.0f}", "%")
    if all(cell.get("nll") is None for cell in cells):
        return _column(above, below, "score", cells=scores)
    width = max(len("nll"), *map(len, nlls))
    return _column(above, below, f"score {'nll':>{width}}", cells=[f"{a} {b:>{width}}" for a, b in zip(scores, nlls)])


def _with_errors(cells: Sequence[Mapping[str, Any]], field: str, show, unit: str = "") -> list[str]:
    """Means with standard errors in parentheses, each below each other."""
    values = ["-" if cell.get(field) is None else show(cell[field]) + unit for cell in cells]
    errors = [cell.get(field + ERROR) for cell in cells]
    shown = ["" if error is None else f"({show(error)})".replace("(0.", "(.") for error in errors]
    wide, width = max(map(len, values)), max(map(len, shown))
    return [f"{value:>{wide}} {error:>{width}}" if width else f"{value:>{wide}}" for value, error in zip(values, shown)]


def _column(*titles: str, cells: Sequence[str], left: bool = False) -> list[str]:
    """Titles and cells, all of one width."""
    lines = [*titles, *cells]
    width = max(map(len, lines))
    return [line.ljust(width) if left else line.rjust(width) for line in lines]


def _rows(columns: Sequence[Sequence[str]], gaps: Sequence[int]) -> list[str]:
    """The lines of a block, with an empty one before each row of `gaps`."""
    lines = [_GAP.join(cells).rstrip() for cells in zip(*columns)]
    titles, body = [line for line in lines[:_TITLES] if line], lines[_TITLES:]
    rule = "-" * max(map(len, lines))
    return [*titles, rule, *(line for i, row in enumerate(body) for line in (["", row] if i in gaps else [row]))]


def _notes(summary: Mapping[str, Any], full: str, front: bool, width: int) -> list[str]:
    entries = list(summary.values())
    counts = sorted({entry["examples"] for entry in entries})
    examples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    errors = any(cell.get(field + ERROR) is not None for e in entries for cell in e["tasks"].values() for field in cell)
    reads = any(entry.get("read") is not None for entry in entries)
    read = " read at a step: what attention reads of it to decode a token." if reads else ""
    notes = [
        "cache: bytes of all its arrays after the context, scales and indices included, without room for tokens to"
        f" come. times smaller: than a full cache in 16 bits.{read} decode speed: tokens per second relative to {full},"
        " in"
        " this run. score: of generated texts, by each task's own metric. nll: negative log-likelihood of the right"
        f" answer, nats per token; ppl: its exponential. Means over {examples} examples a row"
        f"{', standard errors in parentheses' * errors}."
    ]
    if front:
        notes.append("* no other row of that length beats it on both bytes and score (without scores: nll).")
    unbounded = dict.fromkeys(_name(e) for e in entries if e.get("keep") is None and e.get("budget") is None)
    if unbounded:
        notes.append(f"No token budget, so --keep and --budget do not apply: {', '.join(unbounded)}.")
    over = {name: _over_budget(entry) for name, entry in summary.items()}
    if any(over.values()):
        counts = [f"{name} {count} of {summary[name]['examples']}" for name, count in over.items() if count]
        notes.append(
            f"More than the budget was kept on: {', '.join(counts)} examples. Protected tokens stay, and a ring is as"
            " long as the padded prompt asks."
        )
    tasks = {task: cell for entry in entries for task, cell in entry["tasks"].items()}
    partly = [task for task, cell in tasks.items() if 0 < cell.get("scored", 0) < cell["examples"]]
    if partly:
        listed = ", ".join(f"{task} {tasks[task]['examples'] - tasks[task]['scored']}" for task in partly)
        notes.append(f"Examples without an answer, which have no score: {listed}.")
    return [line for note in notes for line in textwrap.wrap(note, width)]


def _over_budget(entry: Mapping[str, Any]) -> int:
    """On how many examples a method kept more than its budget."""
    return round(sum((cell.get("over_budget") or 0.0) * cell["examples"] for cell in entry["tasks"].values()))


def _fixed(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"
