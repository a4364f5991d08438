"""Every notebook runs from its first cell to its last, on the real model."""

import json
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["compose"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_draws(path, monkeypatch, capsys):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()) or plt.close())
    namespace = {}
    with matplotlib.rc_context({"backend": "agg"}):
        for cell in cells:
            exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
    printed = capsys.readouterr().out
    assert len(drawn) == 2 and all(figure.axes for figure in drawn)
    assert "evict cannot follow quantize" in printed
    promised = namespace["promised"]
    assert promised["snapkv + int4"] < promised["snapkv"] / 2 < promised["full"] / 4
    assert namespace["out"].tokens.shape == (1, 16)
