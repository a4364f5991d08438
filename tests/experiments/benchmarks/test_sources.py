"""What --tasks may name, and the windows of texts."""

import pytest

from experiments.benchmarks import sources, text_windows
from tests.experiments.benchmarks.test_task_files import LETTERS


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("", "--tasks must name tasks or files, got an empty name."),
        ("needle_nose", "'needle_nose', and no path of a .jsonl or .txt file; did you mean 'needle_noise'"),
        ("qa_1", "qa_1 needs data of yours: write qa_1=PATH"),
    ],
)
def test_what_is_no_source_is_refused_by_name(name, wanted):
    with pytest.raises(ValueError, match=wanted):
        sources.check(["ruler", name])


def test_names_groups_paths_and_data_are_sources(tmp_path):
    sources.check(["ruler", "passkey", "vt", "mine.jsonl", "book.txt", "qa_2=data.json"])
    assert sources.files(["ruler", "mine.jsonl", "book.txt", "qa_2=data.jsonl"]) == ["mine.jsonl", "book.txt"]
    assert [sources.takes_length(name) for name in ("vt", "mine.jsonl", "book.txt", "qa_1=a.json")] == [1, 0, 1, 1]
    assert sources.split("a,b.jsonl") == ["a", "b.jsonl"]
    (tmp_path / "a,b.jsonl").touch()
    assert sources.split(f"{tmp_path}/a,b.jsonl") == [f"{tmp_path}/a,b.jsonl"]


def test_windows_of_a_text_follow_each_other_and_their_ends_are_predicted(tmp_path):
    text = "".join(chr(33 + i % 90) for i in range(10 * 266))
    (tmp_path / "book.txt").write_text(text)
    windows = text_windows.read_windows(tmp_path / "book.txt", LETTERS, length=10, count=4)
    starts = [0, 2 * 266, 5 * 266, 7 * 266]  # of ten windows that would fit
    assert len(windows) == 4
    for window, start in zip(windows, starts):
        assert LETTERS.decode(window.context_ids) == text[start : start + 10]
        assert LETTERS.decode(window.answer_ids) == text[start + 10 : start + 266]
        assert (window.task, window.question_ids, window.generates, window.length) == ("book", (), False, 10)
    assert len(text_windows.read_windows(tmp_path / "book.txt", LETTERS, length=10, count=99)) == 10


def test_a_text_that_is_too_short_says_what_fits(tmp_path):
    (tmp_path / "book.txt").write_text("a" * 300)
    with pytest.raises(ValueError, match="book.txt has 300 tokens, so a window of 45 .* a context of 1 to 44"):
        text_windows.read_windows(tmp_path / "book.txt", LETTERS, length=45, count=1)
    (tmp_path / "book.txt").write_text("a" * 256)
    with pytest.raises(ValueError, match="has 256 tokens, .* expected a text of more than 256 tokens"):
        text_windows.read_windows(tmp_path / "book.txt", LETTERS, length=1, count=1)
