"""The evaluation's own questions: exact lengths, facts at their depths, nothing shared that must not be."""

import re

import pytest

from experiments.synthetic import KEY_VALUE_PAIRS, SYNTHETIC_TASKS, TEXT_ANSWER_TOKENS, synthetic_tasks
from models import assets

LENGTH = 512
NEEDLE = re.compile(r"One of the special magic numbers for (\w+) is: (\d{7})\.")


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2.tokenizer


@pytest.fixture(scope="module")
def essays():
    return [path.read_text(encoding="utf-8") for path in sorted(assets.fetch(assets.ESSAYS).glob("*.txt"))]


@pytest.fixture(scope="module")
def examples(tokenizer, essays):
    return synthetic_tasks(tokenizer, essays, length=LENGTH, count=5, seed=0)


def of(examples, task):
    return [example for example in examples if example.task == task]


@pytest.mark.parametrize("length", [300, 512, 1023])
def test_contexts_have_exactly_the_length(tokenizer, essays, length):
    examples = synthetic_tasks(tokenizer, essays, length=length, count=3, seed=0)
    assert [len(example.context_ids) for example in examples] == [length] * 15


def test_depths_are_evenly_spread_and_absent_for_text(examples):
    for task in SYNTHETIC_TASKS:
        depths = [example.depth for example in of(examples, task)]
        assert depths == ([None] * 5 if task == "text" else [0.5, 0.0, 1.0, 0.25, 0.75])


@pytest.mark.parametrize("task", ["needle_noise", "needle_essay", "needles"])
def test_needle_lies_at_its_depth_and_is_the_answer(tokenizer, examples, task):
    for example in of(examples, task):
        context, question = tokenizer.decode(example.context_ids), tokenizer.decode(example.question_ids)
        needles = dict(NEEDLE.findall(context))
        (asked,) = [key for key in needles if key in question]
        assert len(needles) == (3 if task == "needles" else 1)
        assert tokenizer.decode(example.answer_ids) == f" {needles[asked]}"
        assert question.endswith(f"for {asked} mentioned in the provided text is:")
        # A sentence of an essay has up to 100 tokens; the other needles take 25 each.
        documents = context.index("afterwards.\n\n") + len("afterwards.\n\n")
        at = (context.index(f"for {asked} is") - documents) / (len(context) - documents)
        assert abs(at - example.depth) < 0.2


def test_needles_begin_where_a_sentence_ends(tokenizer, examples):
    for example in of(examples, "needle_essay") + of(examples, "needle_noise"):
        context = tokenizer.decode(example.context_ids)
        before = context[: NEEDLE.search(context).start()]
        assert before.endswith((". ", "! ", "? ")) or len(tokenizer.encode(before)) < 100


def test_key_value_asks_for_the_line_at_its_depth(tokenizer, examples):
    for example in of(examples, "key_value"):
        pairs = re.findall(r"^(\w+): (\d{5})$", tokenizer.decode(example.context_ids), flags=re.MULTILINE)
        assert len(pairs) == KEY_VALUE_PAIRS
        key, value = pairs[round((KEY_VALUE_PAIRS - 1) * example.depth)]
        assert tokenizer.decode(example.question_ids).endswith(f"\n{key}:")
        assert tokenizer.decode(example.answer_ids) == f" {value}"


def test_text_continues_and_is_not_scored(tokenizer, examples, essays):
    everything = "\n\n".join(" ".join(essay.split()) for essay in essays[::4])
    for example in of(examples, "text"):
        assert not example.generates and example.question_ids == ()
        assert len(example.answer_ids) == TEXT_ANSWER_TOKENS
        # The first and last token may hold part of a character.
        assert tokenizer.decode((example.context_ids + example.answer_ids)[3:-3]) in everything


def test_haystack_never_shows_held_back_text(tokenizer, examples, essays):
    held_back = " ".join(" ".join(essay.split()) for essay in essays[::4])
    for example in of(examples, "needle_essay"):
        documents = tokenizer.decode(example.context_ids).split("afterwards.\n\n")[1]
        sentences = [s for s in re.split(r"(?<=[.!?]) ", documents) if len(s) > 40]
        assert len(sentences) > 5
        assert not [sentence for sentence in sentences[1:] if sentence in held_back]


def test_question_holds_the_rest_of_the_chat(tokenizer, examples):
    for example in examples:
        if example.task != "text":
            context, question = tokenizer.decode(example.context_ids), tokenizer.decode(example.question_ids)
            assert context.startswith("<|im_start|>system\n") and "<|im_start|>user\n" in context
            assert "<|im_end|>\n<|im_start|>assistant\n" in question and "<|im_end|>" not in context.split("user\n")[1]


def test_same_seed_gives_the_same_and_another_seed_does_not(tokenizer, essays, examples):
    assert synthetic_tasks(tokenizer, essays, length=LENGTH, count=5, seed=0) == examples
    other = synthetic_tasks(tokenizer, essays, length=LENGTH, count=5, seed=1)
    assert all(a.answer_ids != b.answer_ids for a, b in zip(examples, other))


def test_more_examples_or_fewer_tasks_change_no_other(tokenizer, essays, examples):
    needles = synthetic_tasks(tokenizer, essays, length=LENGTH, count=7, seed=0, tasks=["text", "needles"])
    assert of(needles, "needles")[:5] == of(examples, "needles")
    assert of(needles, "text")[:5] == of(examples, "text")


def test_model_without_chat_template_gets_plain_text(essays):
    class Letters:
        chat_template = None
        opening = (1,)

        def encode(self, text):
            return [ord(letter) for letter in text]

    (example,) = synthetic_tasks(Letters(), essays, length=900, count=1, seed=0, tasks=["needle_noise"])
    context, question = ("".join(map(chr, ids)) for ids in (example.context_ids, example.question_ids))
    assert len(context) == 900 and context.startswith("\x01A special magic number is hidden")
    assert re.fullmatch(r"\n\nWhat is .*\?\nThe special magic number for \w+ mentioned in .* is:", question)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count: got 0"),
        ({"length": 60}, r"length: got 60, expected at least \d+ for the task needle_noise"),
        ({"length": 10**6, "tasks": ["text"]}, r"length: got 1000000, expected 1 to \d+: the held-back essays"),
        ({"tasks": ["needle"]}, "tasks: unknown task 'needle'; did you mean 'needles'. There are needle_noise"),
        ({"essays": ["one"]}, "essays: got 1 texts, expected at least 2"),
    ],
)
def test_impossible_requests_are_named(tokenizer, essays, change, message):
    arguments = {"essays": essays, "length": LENGTH, "count": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        synthetic_tasks(tokenizer, **arguments)


def test_least_length_that_the_error_names_works(tokenizer, essays):
    with pytest.raises(ValueError) as error:
        synthetic_tasks(tokenizer, essays, length=1, count=1, seed=0, tasks=["key_value"])
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    (example,) = synthetic_tasks(tokenizer, essays, length=least, count=1, seed=0, tasks=["key_value"])
    assert len(example.context_ids) == least
