"""The pictures: what is drawn, and labels that do not overlap."""

import itertools
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from experiments.pictures import plot_needle, plot_pareto, plot_training

FULL_BYTES = 1000


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    return figures


def entry(size, exact, nll):
    return {
        "mean": {"cache_bytes": size, "full_bytes": FULL_BYTES, "score": exact, "nll": nll},
        "tasks": {"needle": {"nll": nll}},
    }


def whole(exact, nll):
    return entry(1000, exact, nll) | {"method": "full"}


SUMMARY = {
    "full": whole(1.0, 0.5),
    "int8": entry(250, 1.0, 0.5),
    "int2": entry(62.5, 0.25, 2.5),
    **{name: entry(500, 1.0, 0.5) for name in ("snapkv", "h2o", "tova", "knorm", "keydiff", "streamingllm")},
}


def labels(axes):
    return {text.get_text(): text for text in axes.texts if isinstance(text, Annotation)}


def test_pareto_draws_score_and_likelihood_lost(tmp_path, drawn):
    plot_pareto(SUMMARY, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    exact, nll = drawn[0].axes
    assert labels(exact)["int2"].xy == (0.0625, 25.0) and labels(nll)["int2"].xy == (0.0625, 2.0)
    assert exact.lines[0].get_xydata().tolist() == [[0.0625, 25.0], [0.25, 100.0]]
    assert nll.lines[0].get_xydata().tolist() == [[0.0625, 2.0], [0.25, 0.0]]
    assert [tick.get_text() for tick in exact.get_xticklabels()] == ["1/32", "1/16", "1/8", "1/4", "1/2", "1", "2"]


def test_labels_cover_no_label_and_no_point(tmp_path, drawn):
    plot_pareto(SUMMARY, tmp_path / "pareto.png")
    for axes in drawn[0].axes:
        boxes = [Text.get_window_extent(label) for label in labels(axes).values()]
        points = [axes.transData.transform(label.xy) for label in labels(axes).values()]
        assert len(boxes) == len(SUMMARY)
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        assert not [(box, point) for box in boxes for point in points if box.contains(*point)]
        assert all(axes.bbox.containsy(box.y0) and axes.bbox.containsx(box.x1) for box in boxes)


def test_without_a_score_only_likelihood_is_drawn(tmp_path, drawn):
    plot_pareto({"full": whole(None, 1.0), "int4": entry(100, None, 1.0)}, tmp_path / "p.png")
    assert [axes.get_title() for axes in drawn[0].axes] == ["Loss of likelihood: lower is better"]


def test_without_full_only_the_score_is_drawn(tmp_path, drawn):
    plot_pareto({"int4": entry(100, 0.5, 1.0)}, tmp_path / "p.png")
    assert [axes.get_title() for axes in drawn[0].axes] == ["Score of answers: higher is better"]


def test_nothing_to_compare_is_refused(tmp_path):
    with pytest.raises(ValueError, match="summary: got no score and no nll beside full's"):
        plot_pareto({"int4": entry(100, None, 1.0)}, tmp_path / "p.png")


def needle_row(method, depth, score, **fields):
    return {"method": method, "depth": depth, "score": score, "task": "t", "example": 0} | fields


def test_needle_prints_the_mean_of_every_cell(tmp_path, drawn):
    rows = [needle_row("full", 0.0, 1.0), needle_row("full", 0.0, 0.0), needle_row("full", 1.0, 1.0)]
    rows += [needle_row("int4", 1.0, 0.0), needle_row("int4", None, 1.0), needle_row("int4", 0.0, None)]
    plot_needle(rows, tmp_path / "needle.png")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["50", "100", "-", "0"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["full", "int4"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "100"]


def test_needle_is_a_grid_of_length_and_depth_where_there_are_several_lengths(tmp_path, drawn):
    rows = [
        needle_row(method, depth, float(depth == keep), keep=keep, length=length)
        for method, keep in (("full", None), ("snapkv", 0.5), ("snapkv", 0.25))
        for length in (128, 64)
        for depth in (0.0, 0.5)
    ]
    plot_needle(rows, tmp_path / "needle.png")
    axes = drawn[0].axes[0]
    names = [f"{name}, {length}" for name in ("full", "snapkv keep=0.5", "snapkv keep=0.25") for length in (64, 128)]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == names
    assert [text.get_text() for text in axes.texts] == 4 * ["0"] + 2 * ["0", "100"] + 4 * ["0"]
    assert axes.get_title() == "Facts found, by method, length and depth"


def test_needle_without_depths_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows: got none with a depth"):
        plot_needle([needle_row("full", None, True)], tmp_path / "needle.png")


def test_import_chooses_no_global_backend():
    program = "import experiments.pictures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_training_shows_every_step_a_running_mean_and_what_was_validated(drawn, tmp_path):
    rows = [{"step": 0, "validation": 3.0}] + [{"step": step, "loss": float(step % 2)} for step in range(1, 41)]
    rows[20]["validation"] = 2.0
    plot_training(rows, tmp_path / "curves.png")
    losses, means, validated = (line.get_xydata().tolist() for line in drawn[0].axes[0].lines)
    assert losses == [[step, step % 2] for step in range(1, 41)]
    assert means[0] == [1, 1.0] and all(y == 0.5 for _, y in means[1:])
    assert validated == [[0, 3.0], [20, 2.0]]
    with pytest.raises(ValueError, match="got none with a loss"):
        plot_training(rows[:1], tmp_path / "none.png")
