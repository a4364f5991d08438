"""Batches: what is trained on, what is not, and what counts."""

import json
import types

import numpy as np
import pytest

from experiments.training_text import Batches, TrainingText

WORDS = 4000


class Numbers:
    """A tokenizer of texts whose words are numbers: no token comes twice."""

    chat_template = None
    opening = (9999,)

    def encode(self, text):
        return [int(word) for word in text.split()]


MODEL = types.SimpleNamespace(
    tokenizer=Numbers(), config=types.SimpleNamespace(name="numbers", max_positions=128, vocab_size=10000)
)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    # All of one width, so that the pieces of a file are cut between words.
    path.write_text("".join(f"{number:04d} " for number in range(WORDS)))
    return str(path)


@pytest.fixture
def questions(tmp_path):
    def write(count=8, question="7 8", answer="5 6", context="1 2 3"):
        lines = [{"task": "sum", "context": context, "question": question, "answer": answer} for _ in range(count)]
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def test_a_number_stands_for_one_batch_and_validation_is_never_trained_on(numbers):
    text = TrainingText(file=numbers, context=20, follow=10, questions=0.0, validation=0.25)
    batches, again = (Batches(text, MODEL, seed=1) for _ in range(2))
    seen = {"training": set(), "validation": set()}
    for part in seen:
        for number in range(200):
            batch = getattr(batches, part)(number, 2)
            for a, b in zip(batch, getattr(again, part)(number, 2)):
                np.testing.assert_array_equal(a, b)
            seen[part] |= {*batch.context[:, 1:].ravel().tolist(), *batch.follow.ravel().tolist()}
            assert (batch.context[:, 0] == 9999).all() and (batch.lengths == 20).all()
    assert not seen["training"] & seen["validation"]
    assert max(seen["training"]) < WORDS * 3 // 4 <= min(seen["validation"]) and len(seen["training"]) > WORDS // 2
    assert not np.array_equal(batches.training(0, 1).context, batches.training(1, 1).context)
    assert not np.array_equal(batches.training(0, 1).context, Batches(text, MODEL, seed=2).training(0, 1).context)


def test_text_follows_its_context_and_all_of_it_counts(numbers):
    batch = Batches(TrainingText(file=numbers, context=20, follow=10, questions=0.0), MODEL, seed=0).training(3, 2)
    whole = np.concatenate([batch.context[:, 1:], batch.follow], axis=1)
    assert (np.diff(whole, axis=1) == 1).all()
    np.testing.assert_allclose(batch.weight, np.tile([0] + [1 / 9] * 9, (2, 1)), rtol=1e-6)


def test_of_a_question_only_the_answer_counts(questions):
    batch = Batches(TrainingText(file=questions(), context=8, follow=6), MODEL, seed=0).validation(0, 1)
    assert batch.context.tolist() == [[9999, 1, 2, 3, 0, 0, 0, 0]] and batch.lengths.tolist() == [4]
    assert batch.follow.tolist() == [[7, 8, 5, 6, 0, 0]]
    assert batch.weight.tolist() == [[0, 0, 0.5, 0.5, 0, 0]]


def test_an_answer_right_after_its_context_counts_from_its_second_token_on(questions):
    text = TrainingText(file=questions(question="", answer="5 6 7"), context=8, follow=6)
    assert Batches(text, MODEL, seed=0).training(0, 1).weight.tolist() == [[0, 0.5, 0.5, 0, 0, 0]]


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(context=100, follow=100), "context and follow make 200 tokens; numbers was trained for 128"),
        (dict(context=0), "context must be at least 1"),
        (dict(questions=2.0), "questions must be in"),
        (dict(pool=1), "pool must be at least 2"),
        (dict(context=60, follow=60, validation=0.98), "too few for pieces of 120"),
    ],
)
def test_what_cannot_be_is_refused(fields, says, numbers):
    with pytest.raises(ValueError, match=says):
        Batches(TrainingText(**(dict(file=numbers, context=20, follow=10, questions=0.0) | fields)), MODEL, seed=0)


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(context="1 " * 20), "TrainingText.context: question 0 .* has 21 tokens, got 8"),
        (dict(question="1 " * 20), "TrainingText.follow: question 0 .* has 22 tokens, got 6"),
        (dict(count=1), "got 1 questions, expected at least 2"),
    ],
)
def test_questions_that_do_not_fit_are_named(fields, says, questions):
    with pytest.raises(ValueError, match=says):
        Batches(TrainingText(file=questions(**fields), context=8, follow=6), MODEL, seed=0)
