"""Metrics on values computed by hand."""

import pytest

from experiments.benchmarks.metrics import METRICS

CASES = {
    ("match_all", "7 and 9", ("7", "8", "9")): 2 / 3,
    ("match_all", "ABCDE fghij", ("abcde", "FGHIJ")): 1.0,
    ("match_part", "in Paris, of course", ("paris", "London")): 1.0,
    ("match_part", "Rome", ("paris", "London")): 0.0,
    ("exact", " 12 \n", ("12",)): 1.0,
    ("exact", "12.", ("12",)): 0.0,
    # {cat, sat, mat} and {cat, sat}: 2 of 3 and 2 of 2, so 2 * 2 / (3 + 2)
    ("f1", "The cat sat; a mat", ("cat sat!",)): 0.8,
    ("f1", "x y", ("z", "x")): 2 / 3,
    ("f1", "x x", ("x y y",)): 0.4,  # a word counts as often as both have it
    ("f1", "", ("x",)): 0.0,
    # police killed gunman / police kill gunman (Lin, 2004): a subsequence of 2 of 4 and of 4 words
    ("rouge_l", "police kill the gunman", ("police killed the gunman",)): 0.75,
    ("rouge_l", "the gunman kill police", ("police killed the gunman",)): 0.5,
    ("rouge_l", "", ("x",)): 0.0,
    # "abcd" and "abed": common "abd", so 2 * 3 / 8
    ("edit", "abcd", ("abed",)): 0.75,
    ("edit", "\n# no\nreturn x\nmore", ("return x",)): 1.0,
    ("edit", "// no", ("x",)): 0.0,
    ("numbers", "Paragraph 3 or 4", ("Paragraph 3",)): 0.5,
    ("numbers", "3", ("Paragraph 3",)): 1.0,
    ("numbers", "none", ("Paragraph 3",)): 0.0,
}


@pytest.mark.parametrize("metric, prediction, references", CASES)
def test_value_is_the_one_computed_by_hand(metric, prediction, references):
    expected = CASES[metric, prediction, references]
    assert METRICS[metric](prediction, references, ()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "prediction, score",
    [
        ("Food", 1.0),
        ("Food or Color", 0.5),
        ("Color", 0.0),
        ("Other food", 0.0),
        ("Food group", 0.5),  # two classes are named
    ],
)
def test_classes_named_beside_the_right_one_divide_its_point(prediction, score):
    classes = ("Food", "Food group", "Color")
    assert METRICS["classification"](prediction, ("Food",), classes) == score


def test_a_class_whose_name_is_part_of_the_right_one_does_not_count():
    assert METRICS["classification"]("Food group", ("Food group",), ("Food", "Food group")) == 1.0
