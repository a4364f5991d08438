"""A summary as a table that a person reads at a glance."""

from collections.abc import Mapping, Sequence
import math
import shutil
import textwrap
from typing import Any

from experiments.results import Row

_GAP = "  "
_TITLES = 3  # lines above the cells of a column


def table(summary: Mapping[str, Any], *, full: str = "full", width: int | None = None) -> str:
    """One row per method: what its cache takes, and what that costs per task.

    Args:
      summary: what `results.summarise` returned.
      full: the method with the full cache, which decode speed and KL are relative to.
      width: columns to fill; None takes the terminal's, or 120 where there is none. Tasks that do not fit go to
          further tables below.

    Returns:
      Lines of plain ASCII, without a line break at the end.
    """
    if not summary:
        raise ValueError("summary: got no methods, expected at least one")
    width = width or shutil.get_terminal_size((120, 24)).columns
    means = {method: entry["mean"] for method, entry in summary.items()}
    points = [(mean["cache_bytes"], mean["exact_match"]) for mean in means.values()]
    complete = all(value is not None for point in points for value in point)
    front = {list(means)[i] for i in pareto_front(points)} if complete else set()
    names = [f"{'*' if method in front else ' '} {method}" for method in means]
    speed = means.get(full, {}).get("decode_tokens_per_second")

    columns = [
        _column("", "", "cache", cells=[human_bytes(mean["cache_bytes"]) for mean in means.values()]),
        _column("", "times", "smaller", cells=[_fixed(times_smaller(mean), 1, "x") for mean in means.values()]),
        _column("", "tokens", "kept", cells=[_fixed(mean["kept_tokens"], 0) for mean in means.values()]),
    ]
    if speed:
        speeds = [mean["decode_tokens_per_second"] for mean in means.values()]
        columns.append(_column("", "decode", "speed", cells=[_fixed(v / speed if v else None, 2, "x") for v in speeds]))
    if any(mean.get("kl") is not None for mean in means.values()):
        columns.append(_column("", "KL to", full, cells=[_fixed(mean.get("kl"), 3) for mean in means.values()]))
    tasks = dict.fromkeys(task for entry in summary.values() for task in entry["tasks"])
    columns += [_task_column(summary, task) for task in tasks]

    first = _column("", "", "  method", cells=names, left=True)
    blocks = [[first]]
    for column in columns:
        if len(blocks[-1]) > 1 and sum(len(other[0]) + len(_GAP) for other in blocks[-1]) + len(column[0]) > width:
            blocks.append([first])
        blocks[-1].append(column)
    parts = [*map(_rows, blocks), _notes(summary, full, bool(front), width)]
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


def _task_column(summary: Mapping[str, Any], task: str) -> list[str]:
    above, _, below = task.partition("_")
    titles = (above, below) if below else ("", above)
    cells = [entry["tasks"].get(task, {}) for entry in summary.values()]
    nlls = [_fixed(cell.get("nll"), 2) for cell in cells]
    exacts = [_percent(cell.get("exact_match")) for cell in cells]
    if all(exact == "-" for exact in exacts):
        return _column(*titles, "nll", cells=nlls)
    both = [f"{exact:>5} {nll:>5}" for exact, nll in zip(exacts, nlls)]
    return _column(*titles, "exact   nll", cells=both)


def _column(*titles: str, cells: Sequence[str], left: bool = False) -> list[str]:
    """Titles and cells, all of one width."""
    lines = [*titles, *cells]
    width = max(map(len, lines))
    return [line.ljust(width) if left else line.rjust(width) for line in lines]


def _rows(columns: Sequence[Sequence[str]]) -> list[str]:
    lines = [_GAP.join(cells).rstrip() for cells in zip(*columns)]
    titles, body = [line for line in lines[:_TITLES] if line], lines[_TITLES:]
    return [*titles, "-" * max(map(len, lines)), *body]


def _notes(summary: Mapping[str, Any], full: str, front: bool, width: int) -> list[str]:
    counts = sorted({entry["examples"] for entry in summary.values()})
    examples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    notes = [
        "cache: bytes of all its arrays after the context, scales and indices included. decode speed: tokens per second"
        f" relative to {full}, in this run. exact: answers right to the last token. nll: negative log-likelihood of the"
        f" answer, nats per token. Means over {examples} examples a method.",
    ]
    if front:
        notes.append("* no other method here beats it on both bytes and exact answers (mean over tasks).")
    unbounded = [method for method, entry in summary.items() if entry["mean"].get("budget_tokens") is None]
    if unbounded:
        notes.append(f"No token budget, so --keep and --budget do not apply: {', '.join(unbounded)}.")
    over = {method: _over_budget(entry) for method, entry in summary.items()}
    if any(over.values()):
        counts = [f"{method} {count} of {summary[method]['examples']}" for method, count in over.items() if count]
        notes.append(
            f"More than the budget was kept on: {', '.join(counts)} examples. Protected tokens stay, and a ring is as"
            " long as the padded prompt asks."
        )
    tasks = {task: cell for entry in summary.values() for task, cell in entry["tasks"].items()}
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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"
