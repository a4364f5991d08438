"""Two evaluations beside each other: rows, paired differences, and what is not comparable."""

import re

import pytest

from experiments import compare
from experiments.results import ResultsFile, Sources
from tests.experiments import in_process
from tests.experiments.test_results import row

SETTINGS = {"model": "tiny", "seed": 0}


def evaluation(path, rows, settings=SETTINGS, content="x"):
    examples = {(each["task"], each["length"], each["example"]): {"content": content} for each in rows}
    with ResultsFile(path, settings, Sources(examples=examples)) as file:
        for each in rows:
            file.append(each)
    return path


@pytest.fixture
def two(tmp_path):
    """Runs whose snapkv lines differ: scores by 0, 1 and 1, likelihoods by 0.5, 0.5 and 2."""
    rows = lambda score, nll: [
        row(method, example=i, score=score(i), nll=nll(i), keep=keep, cache_bytes=size, full_bytes=400)
        for method, keep, size in (("full", None, 400), ("snapkv", 0.5, 200))
        for i in range(3)
    ]
    before = evaluation(tmp_path / "before", rows(lambda i: float(i == 0), lambda i: 1.0))
    after = evaluation(tmp_path / "after", rows(lambda i: 1.0, lambda i: (1.5, 1.5, 3.0)[i]))
    return before, after


def test_differences_are_of_pairs_with_their_standard_error(two):
    code, out, err = in_process.call(compare, *two)
    assert (code, err) == (0, "")
    assert "after minus before, over the examples that both have:" in out
    # 2 / 3 with a standard deviation of sqrt(1 / 3) over sqrt(3); 1 with sqrt(3 / 4) over sqrt(3)
    line = re.search(r"^snapkv +(\S+) \((\S+)\)(.) +(\S+) \((\S+)\)(.) +(\d)$", out, flags=re.MULTILINE)
    assert line.groups() == ("+66.7%", "33.3", " ", "+1.000", "0.500", " ", "3")


def test_rows_of_one_method_stand_below_each_other_with_the_runs_names(two):
    _, out, _ = in_process.call(compare, *two)
    named = re.findall(r"^[* ] (before|after): (\w+) ", out, flags=re.MULTILINE)
    assert named[:4] == [("before", "full"), ("after", "full"), ("before", "snapkv"), ("after", "snapkv")]


def test_a_picture_and_a_table_of_all_lines_are_written_where_they_are_wanted(two, tmp_path):
    code, out, err = in_process.call(compare, *two, f"--output_dir={tmp_path / 'both' / 'of'}")
    assert code == 0, err
    assert (tmp_path / "both" / "of" / "pareto.png").stat().st_size > 10_000
    lines = (tmp_path / "both" / "of" / "results.csv").read_text().splitlines()
    assert lines[0].startswith("run,method,task") and len(lines) == 13


def test_other_examples_under_the_same_name_are_not_compared_and_other_settings_are_said(two, tmp_path):
    rows = [row(example=i) for i in range(3)]
    other = evaluation(tmp_path / "other", rows, SETTINGS | {"seed": 1}, content="y")
    code, out, err = in_process.call(compare, two[0], other)
    assert code == 0 and "other minus before, over the examples that both have: they share none." in out
    assert err.startswith("note: seed: 0 in ") and "1 in " in err


@pytest.mark.parametrize(
    "make, wanted",
    [
        (lambda two, path: two[:1], "error: give the folders of two evaluations or more, got 1."),
        (lambda two, path: (two[0], path), "got no run.json and results.jsonl, expected the output_dir of an evaluat"),
        (lambda two, path: (two[0], two[0]), "error: the folders are the same: "),
        (lambda two, path: (*two, f"--output_dir={two[0]}"), "is not empty; pass --replace"),
    ],
)
def test_what_cannot_be_compared_is_one_line(make, wanted, two, tmp_path):
    code, out, err = in_process.call(compare, *make(two, tmp_path))
    assert code == 2 and wanted in err and len(err.splitlines()) == 1 and out == ""
