"""Means, their standard errors, and the files that other programs read."""

import csv
import errno
import json
import math
import os
import sys

import numpy as np
import pytest

from experiments.summaries import mean_and_error, summarise, write_csv, write_summary
from tests.experiments.test_results import row


def test_summary_has_means_per_task_and_over_tasks():
    summary = summarise(
        [
            row(example=0, nll=1.0, exact_match=True, label="text is left out"),
            row(example=1, nll=2.0, exact_match=False),
            row(example=2, nll=None, exact_match=False),
            row(task="text", nll=4.0, exact_match=None),
            row(method="int4", cache_bytes=50),
        ]
    )
    assert list(summary) == ["full", "int4"]
    needle, text = summary["full"]["tasks"]["needle"], summary["full"]["tasks"]["text"]
    assert (needle["examples"], needle["nll"], needle["exact_match"]) == (3, 1.5, pytest.approx(1 / 3))
    assert (text["examples"], text["nll"], text["exact_match"]) == (1, 4.0, None)
    assert summary["full"]["examples"] == 4 and "label" not in needle
    assert summary["full"]["mean"]["nll"] == (1.5 + 4.0) / 2  # tasks weigh alike, with three examples or one
    assert summary["full"]["mean"]["exact_match"] == pytest.approx(1 / 3)
    assert summary["int4"]["mean"]["cache_bytes"] == 50
    # of 1 and 2: a standard deviation of sqrt(1 / 2) over sqrt(2); of one value there is none
    assert needle["nll_stderr"] == pytest.approx(0.5) and text["nll_stderr"] is None
    assert summary["full"]["mean"]["nll_stderr"] is None


def test_error_of_a_mean_over_tasks_follows_from_those_of_the_tasks():
    rows = [row(task=task, example=i, nll=x) for task, xs in (("a", (1, 3)), ("b", (0, 8))) for i, x in enumerate(xs)]
    mean = summarise(rows)["full"]["mean"]
    assert mean["nll"] == 3.0  # of 2 and 4, with errors 1 and 4
    assert mean["nll_stderr"] == pytest.approx(math.sqrt(1 + 16) / 2)


def test_mean_and_error_are_those_computed_by_hand():
    assert mean_and_error([]) == (None, None) and mean_and_error([3]) == (3, None)
    assert mean_and_error([1, 0, 0, 1]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))


def test_budgets_and_lengths_are_groups_by_length_and_named_where_there_are_several():
    rows = [row("snapkv", keep=keep, length=length) for length in (64, 32) for keep in (0.5, 0.25)] + [row(length=64)]
    summary = summarise(rows)
    assert list(summary) == [
        "snapkv keep=0.5 length=32",
        "snapkv keep=0.25 length=32",
        "snapkv keep=0.5 length=64",
        "snapkv keep=0.25 length=64",
        "full length=64",
    ]
    assert [summary[name][field] for name in list(summary)[:1] for field in ("method", "keep", "length")] == [
        "snapkv",
        0.5,
        32,
    ]
    assert list(summarise(rows[:1])) == ["snapkv"]


def test_csv_holds_every_line_and_field(tmp_path):
    rows = [row(prediction='say "7",\nthen'), row("snapkv", keep=0.5, kl=0.25)]
    write_csv(tmp_path / "results.csv", rows)
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [each["prediction"] for each in read] == [each["prediction"] for each in rows]
    assert [(each["keep"], each["kl"]) for each in read] == [("", ""), ("0.5", "0.25")]


def test_summary_file_says_how_it_was_made(tmp_path):
    path = tmp_path / "summary.json"
    written = write_summary(
        path, [row()], command=["evaluate", "--gin_bindings=a = 'b c'"], gin_config="a = 1\n", device="cpu"
    )
    read = json.loads(path.read_text())
    assert read == written
    assert read["command"] == """evaluate '--gin_bindings=a = '"'"'b c'"'"''"""
    assert read["versions"]["python"] == sys.version.split()[0] and read["versions"]["numpy"] == np.__version__
    assert set(read["versions"]) == {"python", "jax", "jaxlib", "numpy", "kvjax"}
    assert read["machine"]["cpus"] == os.cpu_count() and read["machine"]["device"] == "cpu"
    assert read["gin_config"] == "a = 1\n" and read["methods"] == summarise([row()])


def test_summary_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    arguments = {"command": ["evaluate"], "gin_config": "", "device": "cpu"}
    write_summary(path, [row()], **arguments)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left; the file is as it was before"):
        write_summary(path, [row(), row(example=1)], **arguments)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["summary.json"]
