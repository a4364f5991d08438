"""`make figures`: what marks in pages say, and what becomes of the pages."""

import pytest

from experiments import figures

PAGE = """# A page

<!-- figure one: tables; pareto.png -> docs/one.png -->

```
python -m experiments.evaluate --methods=full,\\
int4 --output_dir=out/one    # a remark
```

```
old
```

<!-- figure two = python -m experiments.plan --model=x -->
```
older
```

after
"""
OUTPUT = "  method  cache  \n---------------\n  full    1 MiB\n\nA note.\n"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "page.md"
    path.write_text(PAGE)
    return path


def test_outputs_and_pictures_go_where_the_marks_are(page, tmp_path, monkeypatch):
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out" / "one" / "pareto.png").write_bytes(b"png")
    ran = []
    monkeypatch.setattr(figures, "_execute", lambda command: ran.append(command) or OUTPUT)
    figures.run()
    assert ran == [
        ("python", "-m", "experiments.evaluate", "--methods=full,int4", "--output_dir=out/one"),
        ("python", "-m", "experiments.plan", "--model=x"),
    ]
    table = "  method  cache\n---------------\n  full    1 MiB\n"
    assert page.read_text() == PAGE.replace("old\n", table, 1).replace("older\n", table + "\nA note.\n")
    assert (tmp_path / "docs" / "one.png").read_bytes() == b"png"
    figures.run("one")
    assert len(ran) == 2  # it is kept
    page.write_text(page.read_text().replace("int4", "int8"))
    figures.run("one")
    assert len(ran) == 3 and "--methods=full,int8" in ran[2]


def test_marks_that_cannot_be_followed_are_refused(page):
    with pytest.raises(ValueError, match="no figure is called 'three'; there are one, two."):
        figures.run("three")
    page.write_text(PAGE.replace("figure two", "figure one"))
    with pytest.raises(ValueError, match="two figures are called one"):
        figures.run()
    page.write_text(PAGE.replace("tables;", "table;"))
    with pytest.raises(ValueError, match="has 'table', expected tables or FILE -> PATH"):
        figures.run()
    page.write_text("<!-- figure one = python -m experiments.plan -->\n")
    with pytest.raises(ValueError, match="needs a fenced block"):
        figures.run()
    page.write_text("<!-- figure one = rm -r x -->\n```\n```\n")
    with pytest.raises(ValueError, match="must be made by python -m experiments"):
        figures.run()


def test_the_marks_of_the_repository_can_be_followed():
    assert {figure.name for figure in figures.all_figures()} >= {"against_kvpress", "head_budgets", "half", "fixed"}
