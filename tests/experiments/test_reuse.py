"""The program that compares ways to use documents again."""

import random

import pytest

from experiments import documents, reuse


class Letters:
    """A tokenizer of single characters, without a chat template."""

    chat_template, opening = None, (1,)

    def encode(self, text):
        return [ord(letter) for letter in text]


ESSAYS = [" ".join(random.Random(seed).choices(["One.", "two", "three", "Four!"], k=900)) for seed in range(8)]


@pytest.mark.parametrize("task", documents.DOCUMENT_TASKS)
def test_documents_have_one_length_and_the_edit_made_them(task):
    how = dict(documents=3, tokens=80, count=2, seed=0, tasks=[task])
    for example in documents.document_tasks(Letters(), ESSAYS, **how):
        assert [len(document) for document in example.documents] == [80] * 3
        assert example.unedited[example.start : example.start + len(example.before)] == example.before
        assert example.unedited[: example.start] == example.context[: example.start]
        if task == "facts":
            assert example.context[example.start : example.stop] == example.answer
            border = "".join(map(chr, (*example.documents[0][-45:], *example.documents[1][:5])))
            assert "magic numbers for" in border and border.endswith(" is: ")
    assert documents.document_tasks(Letters(), ESSAYS, **how) == documents.document_tasks(Letters(), ESSAYS, **how)


def test_documents_without_room_are_refused():
    with pytest.raises(ValueError, match="documents need at least"):
        documents.document_tasks(Letters(), ESSAYS, documents=3, tokens=20, count=1, seed=0, tasks=["facts"])
    with pytest.raises(ValueError, match="must be at least 2, 1 and 2, got 1, 1 and 20"):
        documents.document_tasks(Letters(), ESSAYS, documents=1, tokens=20, count=1, seed=0)


def test_the_table_has_losses_beside_the_full_reading():
    kinds = reuse.variants([0.15])
    rows = [
        dict(zip(reuse.FIELDS, ("facts", 0, method, ratio, 1.0 + index, 0.5, 0.1, 2048)))
        for index, (method, ratio) in enumerate(kinds)
    ]
    lines = reuse.table(rows).splitlines()
    assert lines[0].split() == ["method", "nll", "facts", "lost", "recomputed", "seconds", "cache"]
    assert lines[5].split() == ["cacheblend", "0.15", "4.000", "3.000", "50%", "0.100", "2.00", "KiB"]
