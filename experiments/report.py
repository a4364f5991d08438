"""A summary as a person reads it: a table for the terminal, and two pictures."""

from collections.abc import Mapping, Sequence
import math
import os
import shutil
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from experiments.results import Row

# Okabe and Ito's colours, distinguishable with every kind of colour vision.
_FRONT_COLOR, _OTHER_COLOR, _FULL_COLOR = "#0072B2", "#D55E00", "#000000"
_GAP = "  "
_DPI = 120
_TITLES = 3  # lines above the cells of a column


def table(summary: Mapping[str, Any], *, full: str = "full", width: int | None = None) -> str:
    """One row per method: what its cache takes, and what that costs per task.

    Args:
        summary: what `results.summarise` returned.
        full: the method that decode speed is relative to.
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
        _column("", "times", "smaller", cells=[_fixed(_ratio(mean), 1, "x") for mean in means.values()]),
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
    return "\n\n".join("\n".join(lines) for lines in [*map(_rows, blocks), _notes(means, bool(front))])


def human_bytes(count: float | None) -> str:
    """`count` with a binary unit and three digits: 512 B, 1.50 KiB, 94.4 MiB."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log2(count)) // 10, 4)
    value = count / 1024**power
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {'KMGT'[power - 1]}iB"


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


def plot_pareto(summary: Mapping[str, Any], path: str | os.PathLike[str], *, full: str = "full") -> None:
    """Draws quality against cache bytes: exact match, and negative log-likelihood above the full cache's.

    Args:
        summary: what `results.summarise` returned.
        path: of the picture; its suffix decides the format.
        full: the method whose likelihood the others' is compared with.

    Raises:
        ValueError: if no method has an exact match, nor a likelihood to compare with `full`'s.
    """
    exact = _points(summary, {method: entry["mean"].get("exact_match") for method, entry in summary.items()})
    losses = {method: _nll_increase(entry, summary.get(full)) for method, entry in summary.items()}
    increase = _points(summary, losses)
    panels = [panel for panel in (("exact", exact), ("nll", increase)) if panel[1]]
    if not panels:
        raise ValueError(f"summary: got no exact match and no nll beside {full}'s, expected one of them to draw")
    figure = Figure(figsize=(7.2 * len(panels), 5.6), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (kind, points) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        if kind == "exact":
            axes.set_title("Answers exactly right: higher is better")
            axes.set_ylabel("exact match, mean over tasks (%)")
            points = {method: (x, 100 * y) for method, (x, y) in points.items()}
        else:
            axes.set_title("Loss of likelihood: lower is better")
            axes.set_ylabel(f"nll increase over {full}, mean over tasks (nats per token)")
        _scatter(axes, points, full, sign=1 if kind == "exact" else -1)
    figure.suptitle("Quality against cache size (line: no other method is smaller and as good)", fontsize=13)
    _label_points(figure)
    figure.savefig(path)


def plot_needle(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draws where facts are found: mean exact match per method and depth, over all tasks that plant one.

    Args:
        rows: lines of `results.jsonl`, with `depth` from 0 to 1 where the task has one.
        path: of the picture; its suffix decides the format.

    Raises:
        ValueError: if no row has both a depth and an exact match.
    """
    cells: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row.get("depth") is not None and row["exact_match"] is not None:
            cells.setdefault((row["method"], row["depth"]), []).append(float(row["exact_match"]))
    if not cells:
        raise ValueError("rows: got none with a depth and an exact match, expected some to draw")
    methods = list(dict.fromkeys(method for method, _ in cells))
    depths = sorted({depth for _, depth in cells})
    percent = [
        [100 * sum(found) / len(found) if (found := cells.get((method, depth))) else math.nan for depth in depths]
        for method in methods
    ]
    figure = Figure(figsize=(2.6 + 0.75 * max(len(depths), 4), 1.7 + 0.42 * len(methods)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(percent):
        for x, value in enumerate(line):
            text = "-" if math.isnan(value) else f"{value:.0f}"
            axes.text(x, y, text, ha="center", va="center", color="black" if value > 55 else "white", fontsize=10)
    axes.set_xticks(range(len(depths)), [f"{100 * depth:.3g}" for depth in depths])
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel("depth of the fact in the context (%)")
    axes.set_title("Facts found, by method and depth")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(depths))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(methods))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, label="exact match (%)")
    figure.savefig(path)


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


def _notes(means: Mapping[str, Row], front: bool) -> list[str]:
    notes = [
        "cache: bytes of all its arrays after the context, scales and indices included. exact: answers right to the",
        "last token. nll: negative log-likelihood of the answer, nats per token.",
    ]
    if front:
        notes.append("* no other method here is both smaller and as often right (mean over tasks).")
    unbounded = [method for method, mean in means.items() if mean.get("budget_tokens") is None]
    if unbounded:
        notes.append(f"No token budget, so --keep and --budget do not apply: {', '.join(unbounded)}.")
    return notes


def _ratio(mean: Row) -> float | None:
    return mean["full_bytes"] / mean["cache_bytes"] if mean["cache_bytes"] and mean["full_bytes"] else None


def _fixed(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _points(summary: Mapping[str, Any], qualities: Mapping[str, float | None]) -> dict[str, tuple[float, float]]:
    """(bytes relative to full, quality) of the methods that have both."""
    points = {}
    for method, entry in summary.items():
        ratio, quality = _ratio(entry["mean"]), qualities[method]
        if ratio is not None and quality is not None:
            points[method] = (1 / ratio, quality)
    return points


def _nll_increase(entry: Mapping[str, Any], full: Mapping[str, Any] | None) -> float | None:
    """Mean over the tasks that both have of nll minus the full cache's."""
    if full is None:
        return None
    pairs = [(cell.get("nll"), full["tasks"].get(task, {}).get("nll")) for task, cell in entry["tasks"].items()]
    increases = [nll - base for nll, base in pairs if nll is not None and base is not None]
    return sum(increases) / len(increases) if increases else None


def _scatter(axes: Axes, points: Mapping[str, tuple[float, float]], full: str, *, sign: int) -> None:
    """Points, the front as a line, and one label each, still to be placed; `sign` is -1 where less is better."""
    methods = list(points)
    front = pareto_front([(points[method][0], sign * points[method][1]) for method in methods])
    axes.plot(*zip(*(points[methods[i]] for i in front)), color=_FRONT_COLOR, linewidth=1.5, alpha=0.6, zorder=1)
    for i, method in enumerate(methods):
        marker, color = ("o", _FRONT_COLOR) if i in front else ("s", _OTHER_COLOR)
        if method == full:
            marker, color = "*", _FULL_COLOR
        axes.scatter(*points[method], s=130 if marker == "*" else 45, marker=marker, color=color, zorder=3)
        axes.annotate(
            method,
            points[method],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9.5,
            color=color,
            zorder=4,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": color, "shrinkA": 0, "shrinkB": 3},
        )
    ratios = [x for x, _ in points.values()]
    powers = range(math.floor(math.log2(min(ratios)) - 0.3), math.ceil(math.log2(max(ratios)) + 0.3) + 1)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2.0**power for power in powers], [f"1/{2**-power}" if power < 0 else f"{2**power}" for power in powers])
    axes.set_xlim(2.0 ** powers[0], 2.0 ** powers[-1])
    axes.margins(y=0.14)
    axes.set_xlabel("cache bytes relative to the full cache (log scale)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _label_points(figure: Figure) -> None:
    """Moves every label to the nearest place beside its point that covers no point, label or front."""
    figure.canvas.draw()
    figure.set_layout_engine("none")  # the axes must stay where the labels were placed
    for axes in figure.axes:
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        points = [axes.transData.transform(label.xy) for label in labels]
        corners = axes.transData.transform(axes.lines[0].get_xydata())
        along = [a + (b - a) * i / 40 for a, b in zip(corners, corners[1:]) for i in range(41)]
        taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in points]
        taken += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in along]
        for label, point in sorted(zip(labels, points), key=lambda pair: tuple(pair[1])):
            extent = label.get_window_extent()
            distance, box = _free_box(point, extent.width, extent.height, taken, axes.bbox)
            taken.append(box.padded(1))
            label.set_position((box.p0 - point) * 72 / figure.dpi)
            label.arrow_patch.set_visible(distance > 16)


def _free_box(
    point: Sequence[float], width: float, height: float, taken: Sequence[Bbox], bounds: Bbox
) -> tuple[float, Bbox]:
    """The nearest free place for a label, in pixels, and its distance; beside the point where none is free."""
    boxes = []
    for distance in range(10, 240, 6):
        for step in (0, 8, 4, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11):  # sixteenths of a turn, sides first
            angle = step * math.pi / 8
            x = point[0] + math.cos(angle) * (width / 2 + distance)
            y = point[1] + math.sin(angle) * (height / 2 + distance)
            box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
            inside = bounds.containsx(box.x0) and bounds.containsx(box.x1) and bounds.containsy(box.y0)
            boxes.append((distance, box))
            if inside and bounds.containsy(box.y1) and not box.count_overlaps(taken):
                return boxes[-1]
    return boxes[0]
