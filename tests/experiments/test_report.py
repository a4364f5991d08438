"""The table: numbers, units, and lines that fit."""

import re

import pytest

from experiments.report import human_bytes, pareto_front, table
from experiments.summaries import summarise

# (cache bytes, tokens kept, budget, right answers of 4, tokens per second)
METHODS = {
    "full": (96 * 2**20, 2048, None, 4, 20.0),
    "int4": (24 * 2**20, 2048, None, 3, 30.0),
    "snapkv": (48 * 2**20, 1024, 1024, 3, 25.0),
}


def summary(tasks=("needle_noise", "text"), methods=METHODS):
    """Four examples a task: nll 0, 0.25, 0.5, 0.75, with a standard error of 0.16."""
    return summarise(
        {
            "method": method,
            "task": task,
            "example": example,
            "nll": 0.25 * example,
            "score": None if task == "text" else float(example < right),
            "keep": budget and budget / 2048,
            "cache_bytes": size,
            "full_bytes": 96 * 2**20,
            "kept_tokens": kept,
            "prefill_seconds": 1.0,
            "decode_tokens_per_second": speed,
            "kl": 0.125,
            "budget_tokens": budget,
        }
        for method, (size, kept, budget, right, speed) in methods.items()
        for task in tasks
        for example in range(4)
    )


def cells(text, method):
    """The words of a method's row."""
    return re.search(rf"^[* ] ({method} .*)$", text, flags=re.MULTILINE)[1].split()


def test_row_has_size_ratio_tokens_speed_and_quality():
    text = table(summary(), width=120)
    assert cells(text, "int4") == "int4 24.0 MiB 4.0x 2048 1.50x 0.125 75% (25) 0.38 (.11)".split()
    assert cells(text, "snapkv") == "snapkv 48.0 MiB 2.0x 1024 1.25x 0.125 75% (25) 0.38 (.11)".split()
    assert cells(text, "full") == "full 96.0 MiB 1.0x 2048 1.00x 0.125 100% (0) 0.38 (.11)".split()
    by_task = text.split("\n\n")[1]
    assert cells(by_task, "int4") == "int4 75% (25) 0.38 (.16) 0.38 (.16) 1.5".split()  # exp(0.375)


def test_front_and_methods_without_a_budget_are_marked():
    text = table(summary(), width=120)
    marked = [line.split()[1] for line in text.splitlines() if re.match(r"\* (full|int4|snapkv)", line)]
    assert marked == 2 * ["full", "int4"]  # snapkv is larger than int4 and as often right
    assert "No token budget, so --keep and --budget do not apply: full, int4." in text


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_lines_fit_and_are_plain(width):
    tasks = ("needle_noise", "needle_essay", "needles", "key_value", "text", "a_rather_long_name")
    text = table(summary(tasks), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.isascii() and "\x1b" not in text
    for task in ("noise", "essay", "needles", "value", "text", "a_rather", "long_name"):
        assert task in text


def test_missing_values_are_dashes():
    empty = summary()
    for field in ("cache_bytes", "score", "score_stderr", "decode_tokens_per_second", "kept_tokens"):
        empty["int4"]["mean"][field] = None
    empty["int4"]["tasks"] = {}
    text = table(empty, width=120)
    assert cells(text, "int4") == "int4 - - - - 0.125 - 0.38 (.11)".split()
    assert cells(text.split("\n\n")[1], "int4") == "int4 - - - -".split()


def test_one_task_needs_no_table_of_its_own():
    text = table(summary(["needle_noise"]), width=120)
    assert cells(text, "int4") == "int4 24.0 MiB 4.0x 2048 1.50x 0.125 75% (25) 0.38 (.16)".split()
    assert len(text.split("\n\n")) == 2 and text.splitlines()[1].split()[-1] == "noise"


def test_budgets_and_lengths_are_columns_where_there_are_several():
    rows = []
    for keep, length, size in ((None, 64, 10), (0.5, 64, 4), (0.25, 64, 3), (None, 128, 20), (0.5, 128, 8)):
        one = dict(task="t", example=0, nll=1.0, score=1.0, full_bytes=length, cache_bytes=size, kept_tokens=1)
        one |= dict(method="snapkv" if keep else "full", keep=keep, length=length, decode_tokens_per_second=size / 2)
        rows.append(one)
    text = table(summarise(rows), width=120)
    assert text.splitlines()[1].split()[:3] == ["method", "keep", "context"]
    assert re.findall(r"^[* ] (full|snapkv) +(\S+) +(\d+) .* (\S+x) +1 +(\S+x)", text, flags=re.MULTILINE) == [
        ("full", "-", "64", "6.4x", "1.00x"),  # relative to the full cache of its own length
        ("snapkv", "0.5", "64", "16.0x", "0.40x"),
        ("snapkv", "0.25", "64", "21.3x", "0.30x"),
        ("full", "-", "128", "6.4x", "1.00x"),
        ("snapkv", "0.5", "128", "16.0x", "0.40x"),
    ]
    assert [line for line in text.splitlines() if line.startswith("* ")] and "\n\n  full" in text


def test_without_the_full_method_there_is_no_relative_speed():
    assert "speed" not in table(summary(methods={"int4": METHODS["int4"]}), width=120).split("cache:")[0]


def test_summary_without_methods_is_refused():
    with pytest.raises(ValueError, match="summary: got no methods"):
        table({})


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (94.4 * 2**20, "94.4 MiB")]
    + [(100 * 2**20, "100 MiB"), (2**30, "1.00 GiB"), (5 * 2**40, "5.00 TiB"), (5000 * 2**40, "5000 TiB")],
)
def test_bytes_have_three_digits(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 5)], [0]),
        ([(4, 9), (2, 5), (3, 5), (1, 1), (4, 8)], [3, 1, 0]),
        ([(1, 5), (1, 5), (2, 5)], [0, 1]),  # equal points stay together
        ([(1, 1), (1, 2)], [1]),
    ],
)
def test_pareto_front(points, front):
    assert pareto_front(points) == front


def test_notes_say_how_often_a_budget_was_not_met_and_what_has_no_score():
    rows = [
        dict(method=method, task="a", example=i, nll=nll, score=None, cache_bytes=8, full_bytes=8)
        | {"kept_tokens": 9, "decode_tokens_per_second": None, "budget_tokens": budget, "over_budget": over[i]}
        for method, budget, over in (("full", None, [None] * 3), ("snapkv", 8, [True, False, True]))
        for i, nll in enumerate((0.5, None, 0.5))
    ]
    text = table(summarise(rows), width=400)
    assert "More than the budget was kept on: snapkv 2 of 3 examples." in text
    assert "Examples without an answer, which have no score: a 1." in text
    assert "More than" not in table(summary(), width=400) and "have no score" not in table(summary(), width=400)


def test_what_a_step_reads_has_a_column_where_methods_are_told_and_a_row_for_each():
    rows = [
        {
            "method": "quest",
            "task": "text",
            "example": 0,
            "nll": 1.0,
            "score": None,
            "read": read,
            "cache_bytes": 2**20,
            "full_bytes": 2**20,
            "read_bytes": int(2**20 * read),
            "kept_tokens": 64,
            "prefill_seconds": 1.0,
            "decode_tokens_per_second": None,
        }
        for read in (0.5, 0.25)
    ]
    assert list(summarise(rows)) == ["quest read=0.5", "quest read=0.25"]
    text = table(summarise(rows), width=120)
    assert cells(text, "quest +0.5")[:5] == "quest 0.5 1.00 MiB 1.0x".split()
    assert "512 KiB" in text and "256 KiB" in text and "read at a step: what attention reads" in " ".join(text.split())
    assert list(summarise(rows[:1])) == ["quest"]
    assert "read at" not in table(summary(), width=120)
