"""A summary as pictures: quality against bytes, and where in the context facts are found."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from experiments.report import pareto_front, times_smaller
from experiments.results import Row
from experiments.summaries import Group

# Okabe and Ito's colours, distinguishable with every kind of colour vision.
_FRONT_COLOR, _OTHER_COLOR, _FULL_COLOR = "#0072B2", "#D55E00", "#000000"
_DPI = 120


def plot_pareto(summary: Mapping[str, Any], path: str | os.PathLike[str], *, full: str = "full") -> None:
    """Draws quality against cache bytes: the score, and negative log-likelihood above the full cache's.

    Args:
      summary: what `summaries.summarise` returned.
      path: of the picture; its suffix decides the format.
      full: the method whose likelihood the others' is compared with, at the same length of context.

    Raises:
      ValueError: if no method has a score, nor a likelihood to compare with `full`'s.
    """
    scores = _points(summary, {name: entry["mean"].get("score") for name, entry in summary.items()})
    whose = lambda entry: (entry.get("run"), entry.get("length"))
    bases = {whose(entry): entry for entry in summary.values() if entry.get("method") == full}
    losses = {name: _nll_increase(entry, bases.get(whose(entry))) for name, entry in summary.items()}
    increase = _points(summary, losses)
    kinds = [panel for panel in (("score", scores), ("nll", increase)) if panel[1]]
    if not kinds:
        raise ValueError(f"summary: got no score and no nll beside {full}'s, expected one of them to draw")
    lengths = sorted({entry.get("length") for entry in summary.values()}, key=lambda length: length or 0)
    figure = Figure(figsize=(7.2 * len(kinds), 0.4 + 5.2 * len(lengths)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    whole = {name for name, entry in summary.items() if entry.get("method") == full}
    panels = [(length, *panel) for length in lengths for panel in kinds]
    for number, (length, kind, points) in enumerate(panels, start=1):
        points = {name: point for name, point in points.items() if summary[name].get("length") == length}
        if not points:
            continue
        axes = figure.add_subplot(len(lengths), len(kinds), number)
        tokens = "" if len(lengths) == 1 else f", {f'{length} tokens' if length else 'contexts of their own length'}"
        if kind == "score":
            axes.set_title(f"Score of answers{tokens}: higher is better")
            axes.set_ylabel("score, mean over tasks (%)")
            points = {name: (x, 100 * y) for name, (x, y) in points.items()}
        else:
            axes.set_title(f"Loss of likelihood{tokens}: lower is better")
            axes.set_ylabel(f"nll increase over {full}, mean over tasks (nats per token)")
        labels = {name: name.removesuffix(f" length={length}").replace("keep=", "") for name in points}
        _scatter(axes, points, labels, whole, sign=1 if kind == "score" else -1)
    figure.suptitle("Quality against cache size (the line joins the methods that no other beats on both)", fontsize=13)
    _label_points(figure)
    _save(figure, path)


def plot_needle(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draws where facts are found: mean score per method, length of context and depth, over all tasks that plant one.

    Args:
      rows: lines of `results.jsonl`, with `depth` from 0 to 1 where the task has one.
      path: of the picture; its suffix decides the format.

    Raises:
      ValueError: if no row has both a depth and a score.
    """
    rows = [row for row in rows if row.get("depth") is not None and row.get("score") is not None]
    if not rows:
        raise ValueError("rows: got none with a depth and a score, expected some to draw")
    groups = list(dict.fromkeys(map(Group.of, rows)))
    budgets, lengths = ({of(group) for group in groups} for of in (lambda g: g[1:3], lambda g: g.length))

    def name(group: Group) -> str:
        setting = group.setting if len(budgets - {(None, None)}) > 1 else group.method
        return setting if len(lengths) == 1 else f"{setting}, {group.length or 'own'}"

    order = {setting: i for i, setting in enumerate(dict.fromkeys(group.setting for group in groups))}
    groups.sort(key=lambda group: (order[group.setting], group.length or 0))
    cells: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        cells.setdefault((name(Group.of(row)), row["depth"]), []).append(row["score"])
    methods = list(dict.fromkeys(map(name, groups)))
    depths = sorted({depth for _, depth in cells})
    percent = [
        [100 * sum(found) / len(found) if (found := cells.get((method, depth))) else math.nan for depth in depths]
        for method in methods
    ]
    size = (2.6 + 0.75 * max(len(depths), 4), 1.7 + 0.42 * len(methods))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(percent):
        for x, value in enumerate(line):
            text = "-" if math.isnan(value) else f"{value:.0f}"
            axes.text(x, y, text, ha="center", va="center", color="white" if value <= 55 else "black", fontsize=10)
    axes.set_xticks(range(len(depths)), [f"{100 * depth:.3g}" for depth in depths])
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel("depth of the fact in the context (%)")
    by = "method, length and depth" if len(lengths) > 1 else "method and depth"
    axes.set_title(f"Facts found, by {by}")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(depths))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(methods))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, label="score (%)")
    _save(figure, path)


def plot_training(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draws a training: the loss of every step, their running mean, and the loss on text not trained on.

    Args:
      rows: lines of `metrics.jsonl`, with `step`, `loss` and, now and then, `validation`.
      path: of the picture; its suffix decides the format.

    Raises:
      ValueError: if there are no losses.
    """
    taken = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    if not taken:
        raise ValueError("rows: got none with a loss, expected at least one step to draw")
    steps, losses = zip(*taken)
    width = max(1, len(taken) // 20)
    means = [sum(losses[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(losses))]
    validated = [(row["step"], row["validation"]) for row in rows if row.get("validation") is not None]
    figure = Figure(figsize=(7.2, 4.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=_FRONT_COLOR, linewidth=0.8, alpha=0.35, label="loss of a step")
    axes.plot(steps, means, color=_FRONT_COLOR, linewidth=1.8, label=f"mean of {width} steps")
    if validated:
        axes.plot(*zip(*validated), color=_OTHER_COLOR, marker="o", linewidth=1.8, label="text not trained on")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_memory(rows: Sequence[Row], path: str | os.PathLike[str], *, title: str) -> None:
    """Draws what each method takes of a device's memory: weights, cache and what is beside them.

    Args:
      rows: of `experiments.plan`, with `weight_bytes`, `cache_bytes`, `peak_bytes` and `hbm_bytes`.
      path: of the picture; its suffix decides the format.
      title: above the picture.
    """
    figure = Figure(figsize=(7.2, 1.6 + 0.45 * len(rows)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [row["method"] for row in rows]
    left = [0.0] * len(rows)
    beside = [max(row["peak_bytes"] - row["weight_bytes"] - row["cache_bytes"], 0) for row in rows]
    parts = (
        ("weights", [row["weight_bytes"] for row in rows], _OTHER_COLOR),
        ("cache", [row["cache_bytes"] for row in rows], _FRONT_COLOR),
        ("beside, at the peak", beside, "#999999"),
    )
    for label, values, color in parts:
        values = [value / 2**30 for value in values]
        axes.barh(names, values, left=left, color=color, label=label)
        left = [a + b for a, b in zip(left, values)]
    axes.axvline(rows[0]["hbm_bytes"] / 2**30, color=_FULL_COLOR, linestyle="--", label="HBM of a device")
    axes.invert_yaxis()
    axes.set_xlabel("GiB on one device")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_reuse(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws what reading documents apart loses against how much of them is read again, one panel a task.

    Args:
      rows: lines of `experiments.reuse`.
      path: of the picture; its suffix decides the format.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(6.4 * len(tasks), 4.8), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for number, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(1, len(tasks), number)
        points: dict[tuple[str, float | None], list[tuple[float, float]]] = {}
        for row in rows:
            if row["task"] == task:
                points.setdefault((row["method"], row["ratio"]), []).append((row["recomputed"], row["nll"]))
        means = {kind: tuple(sum(x) / len(x) for x in zip(*of)) for kind, of in points.items()}
        blended = sorted(point for (method, _), point in means.items() if method == "cacheblend")
        axes.plot(*zip(*blended), marker="o", color=_FRONT_COLOR, label="cacheblend")
        for (method, _), (x, y) in means.items():
            if method != "cacheblend":
                axes.plot(x, y, marker="s", linestyle="none", color=_FULL_COLOR if method == "full" else _OTHER_COLOR)
                axes.annotate(method, (x, y), xytext=(6, 4), textcoords="offset points")
        axes.set_title(f"{task}: lower is better")
        axes.set_xlabel("part of the context's keys and values that is computed again")
        axes.set_ylabel("loss of the right answer (nats per token)")
        axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a picture; an error names the file."""
    try:
        figure.savefig(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def _points(summary: Mapping[str, Any], qualities: Mapping[str, float | None]) -> dict[str, tuple[float, float]]:
    """(bytes relative to full, quality) of the methods that have both."""
    points = {}
    for method, entry in summary.items():
        ratio, quality = times_smaller(entry["mean"]), qualities[method]
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


def _scatter(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    labels: Mapping[str, str],
    whole: Collection[str],
    *,
    sign: int,
) -> None:
    """Points, the front as a line, and one label each, still to be placed.

    `whole` are the names of full caches, and `sign` is -1 where less is better.
    """
    methods = list(points)
    front = pareto_front([(points[method][0], sign * points[method][1]) for method in methods])
    axes.plot(*zip(*(points[methods[i]] for i in front)), color=_FRONT_COLOR, linewidth=1.5, alpha=0.6, zorder=1)
    for i, method in enumerate(methods):
        marker, color = ("o", _FRONT_COLOR) if i in front else ("s", _OTHER_COLOR)
        if method in whole:
            marker, color = "*", _FULL_COLOR
        size = 130 if marker == "*" else 45
        axes.scatter(*points[method], s=size, marker=marker, color=color, edgecolor="white", zorder=3)
        axes.annotate(
            labels[method],
            points[method],
            xytext=(0, 0),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=9.5,
            color=color,
            zorder=4,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": color, "shrinkA": 0, "shrinkB": 3},
        )
    ratios = [x for x, _ in points.values()]
    powers = range(math.floor(math.log2(min(ratios)) - 0.3), math.ceil(math.log2(max(ratios)) + 0.3) + 1)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2.0**power for power in powers], [_power_of_two(power) for power in powers])
    axes.set_xlim(2.0 ** powers[0], 2.0 ** powers[-1])
    axes.margins(y=0.14)
    axes.set_xlabel("cache bytes relative to a full cache in 16 bits (log scale)")
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
            extent = Text.get_window_extent(label)  # without the line to the point
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
            if distance > 16 and step in (4, 12):
                continue  # the line to a label straight above would cross the labels between
            angle = step * math.pi / 8
            x = point[0] + math.cos(angle) * (width / 2 + distance)
            y = point[1] + math.sin(angle) * (height / 2 + distance)
            box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
            inside = bounds.containsx(box.x0) and bounds.containsx(box.x1) and bounds.containsy(box.y0)
            boxes.append((distance, box))
            if inside and bounds.containsy(box.y1) and not box.count_overlaps(taken):
                return boxes[-1]
    return boxes[0]


def _power_of_two(power: int) -> str:
    return f"1/{2**-power}" if power < 0 else f"{2**power}"
