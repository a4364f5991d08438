"""Task files: what is read, and how a bad line is named."""

import json
import types

import pytest

from experiments.benchmarks.task_files import MORE_TOKENS, read_tasks
from experiments.tasks import Example

VOCAB_SIZE = 128
# One token a character, so that ids can be written down by hand.
LETTERS = types.SimpleNamespace(
    chat_template=None,
    opening=(),
    encode=lambda text: [ord(letter) for letter in text],
    decode=lambda ids: "".join(map(chr, ids)),
)


def read(tmp_path, *lines, max_examples=None):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return read_tasks(path, LETTERS, vocab_size=VOCAB_SIZE, max_examples=max_examples)


def test_text_and_ids_give_the_same_example(tmp_path):
    text, ids = read(
        tmp_path,
        {"task": "t", "context": "ab", "question": "c", "answer": "de"},
        {"task": "t", "context_ids": [97, 98], "question_ids": [99], "answer_ids": [100, 101]},
    )
    assert text == ids == Example("t", (97, 98), (99,), (100, 101), ("de",), "match_part", 2 + MORE_TOKENS)


@pytest.mark.parametrize("question", [{}, {"question": ""}, {"question_ids": []}])
def test_question_may_be_empty_or_absent(tmp_path, question):
    assert read(tmp_path, {"task": "t", "context": "a", "answer": "b"} | question)[0].question_ids == ()


def test_absent_answer_is_not_scored(tmp_path):
    assert read(tmp_path, {"task": "t", "context": "a"}) == [Example("t", (97,), ())]


def test_other_fields_and_blank_lines_are_ignored(tmp_path):
    assert len(read(tmp_path, {"task": "t", "context": "a", "id": 7}, "", "  ", {"task": "t", "context": "b"})) == 2


def test_max_examples_keeps_the_first_of_each_task(tmp_path):
    lines = [{"task": task, "context": context} for task, context in ("xa", "yb", "xc", "yd", "xe")]
    kept = read(tmp_path, *lines, max_examples=2)
    assert [(example.task, chr(example.context_ids[0])) for example in kept] == [
        ("x", "a"),
        ("y", "b"),
        ("x", "c"),
        ("y", "d"),
    ]
    with pytest.raises(ValueError, match="max_examples: got 0, expected at least 1"):
        read(tmp_path, *lines, max_examples=0)


GOOD = {"task": "t", "context": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "t", ', "not JSON"),
        ('{"task": "t", "context": "a"', r"not JSON \(Expecting ',' delimiter at column 29\)"),
        ("[" * 100_000, "got brackets nested too deeply, expected one JSON object"),
        ('{"task": "t", "context_ids": [%s]}' % ("9" * 5000), "got a number of thousands of digits"),
        ("[1, 2]", r"got \[1, 2\], expected a JSON object"),
        ({"context": "a"}, "task: got None, expected a non-empty string"),
        ({"task": 3, "context": "a"}, "task: got 3, expected a non-empty string"),
        ({"task": "t"}, "context: got neither context nor context_ids"),
        ({"task": "t", "context": ""}, "context: got an empty prompt"),
        ({"task": "t", "context_ids": []}, "context: got an empty prompt"),
        ({"task": "t", "context": 5}, "context: got 5, expected a string"),
        (GOOD | {"context_ids": [1]}, "context: got both context and context_ids"),
        (GOOD | {"answer_ids": [1]}, "answer: got both answer and answer_ids"),
        (GOOD | {"question": "q", "question_ids": [1]}, "question: got both"),
        (GOOD | {"answer": ""}, "answer: got an empty answer"),
        (GOOD | {"question": ["q"]}, r"question: got \['q'\], expected a string"),
        ({"task": "t", "context_ids": "12"}, "context_ids: got '12', expected a list of token ids"),
        ({"task": "t", "context_ids": [1, 128]}, r"context_ids\[1\]: got 128, expected an integer from 0 to 127"),
        ({"task": "t", "context_ids": [-1]}, r"context_ids\[0\]: got -1"),
        ({"task": "t", "context_ids": [1.0]}, r"context_ids\[0\]: got 1.0"),
        ({"task": "t", "context_ids": [True]}, r"context_ids\[0\]: got True"),
        (GOOD | {"answers": []}, "answers: got an empty list, expected at least one text"),
        (GOOD | {"answers": [3]}, r"answers: got \[3\], expected a list of strings"),
        (GOOD | {"metric": "F1"}, "metric: unknown metric 'F1'; did you mean 'f1'"),
        (GOOD | {"metric": ["f1"]}, r"metric: unknown metric \['f1'\]; there are match_all"),
        (GOOD | {"metric": "classification"}, "classes: got none, expected the names"),
        (GOOD | {"max_new_tokens": 0}, "max_new_tokens: got 0, expected a number of tokens"),
        (GOOD | {"max_new_tokens": True}, "max_new_tokens: got True"),
        (GOOD | {"stop": [""]}, "stop: got an empty text"),
        (GOOD | {"depth": 2}, "depth: got 2, expected a number from 0 to 1"),
        (GOOD | {"turns": []}, r"turns: got \[\], expected a list of objects"),
        (GOOD | {"turns": ["q"]}, r"turns: got \['q'\], expected a list of objects"),
        (GOOD | {"multi_turn": True}, "multi_turn: got True, expected true or false, beside turns"),
        ({"task": "t", "context": "a", "turns": [{"answer": ""}]}, r"turns\[0\]: answer: got an empty answer"),
        ({"dataset": "lambada", "input": "q", "context": "a"}, "dataset: got 'lambada', expected one of narrativeqa"),
        ({"dataset": "trec", "input": 3, "context": "a"}, "input: got 3, expected a string"),
        ({"dataset": "trec", "input": "q", "context": "a", "answers": ["b"]}, "classes: got none"),
    ],
)
def test_bad_line_is_named_on_one_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, GOOD, line, max_examples=1)
    assert str(error.value).startswith(f"{tmp_path / 'tasks.jsonl'}, line 2: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))


def test_references_metric_and_stops_are_those_of_the_line(tmp_path):
    line = {"task": "t", "context": "a", "question": "q", "answers": ["bc", "d"], "metric": "f1", "max_new_tokens": 5}
    (example,) = read(tmp_path, line | {"stop": "!", "depth": 1})
    assert example == Example("t", (97,), (113,), (98, 99), ("bc", "d"), "f1", 5, ("!",), depth=1.0)
    assert example.score("the d") == 1.0


def test_turns_are_asked_about_one_context_with_or_without_what_was_said_before(tmp_path):
    turns = [{"question": "p", "answer": "b"}, {"question": "q", "answer": "c", "metric": "exact"}]
    line = {"task": "t", "context": "a", "turns": turns, "max_new_tokens": 3}
    alone = read(tmp_path, line)
    assert [example.context_ids for example in alone] == 2 * [(97,)]
    assert [example.question_ids for example in alone] == [(112,), (113,)]
    assert [(example.metric, example.new_tokens) for example in alone] == [("match_part", 3), ("exact", 3)]
    said = read(tmp_path, line | {"multi_turn": True})
    assert [example.question_ids for example in said] == [(112,), (112, 98, 113)]
    assert [example.answer_ids for example in said] == [(98,), (99,)]


def test_lines_of_longbench_are_read_as_they_are_published(tmp_path):
    line = {"input": "q", "context": "a", "answers": ["b", "c"], "length": 9, "language": "en", "_id": "1"}
    question, code, classes = read(
        tmp_path,
        line | {"dataset": "hotpotqa_e", "all_classes": None},
        line | {"dataset": "lcc", "all_classes": None},
        line | {"dataset": "trec", "all_classes": ["b", "d"]},
    )
    assert (question.task, question.metric, question.new_tokens) == ("hotpotqa_e", "f1", 32)
    assert LETTERS.decode(question.question_ids) == "\n\nq\n" and question.references == ("b", "c")
    assert (code.metric, code.question_ids, code.new_tokens) == ("edit", (113,), 64)
    assert (classes.metric, classes.classes, classes.stops) == ("classification", ("b", "d"), ("\n",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"task": "t", "context": "a", "anwser": "b"}, "unknown field 'anwser'; did you mean 'answer'?"),
        ({"task": "t", "context": "a", "Answer": "b"}, "unknown field 'Answer'; did you mean 'answer'?"),
        ({"task": "t", "context": "a", "anwsers": ["b"]}, "unknown field 'anwsers'; did you mean 'answers'?"),
        (GOOD | {"metrics": "f1"}, "unknown field 'metrics'; did you mean 'metric'?"),
        ({"task": "t", "context": "a", "turns": [{"qestion": "b"}]}, "turns[0]: unknown field 'qestion'; did you"),
        ({"task": "t", "contxt": "a"}, "unknown field 'contxt'; did you mean 'context'?"),
        ({"task": "t", "context": "a", "answer": None, "anwser_ids": [97]}, "did you mean 'answer_ids'?"),
        ({"task": "t", "context": "a", "question_id": [97]}, "did you mean 'question_ids'?"),
    ],
)
def test_a_misspelled_field_is_refused(tmp_path, line, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, GOOD, line)
    assert str(error.value).startswith(f"{tmp_path / 'tasks.jsonl'}, line 2: ") and message in str(error.value)


def test_a_field_that_is_nearly_one_that_is_there_is_ignored_and_so_is_the_id_of_a_question(tmp_path):
    line = {"task": "t", "context": "a", "answer": "b", "anwser": "c", "question_id": 7, "context_length": 1}
    assert read(tmp_path, line) == [Example("t", (97,), (), (98,), ("b",), "match_part", 1 + MORE_TOKENS)]


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    wanted = Example("t", (97,), (), (98,), ("b",), "match_part", 1 + MORE_TOKENS)
    assert read_tasks(path, LETTERS, vocab_size=VOCAB_SIZE) == [wanted]


@pytest.mark.parametrize("field", ["task", "context", "question", "answer"])
def test_half_of_a_surrogate_pair_is_named(tmp_path, field):
    line = '{"task": "t", "context": "a", "%s": "ab\\ud800c"}' % field
    with pytest.raises(ValueError) as error:
        read(tmp_path, line)
    wanted = f"line 1: {field}: got half of a surrogate pair (\\ud800 at character 2), expected text"
    assert str(error.value).endswith(wanted)
    assert read(tmp_path, line.replace("\\ud800", "\\ud83d\\ude00"))  # a whole pair is one character


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b'{"task": "t", "context": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: got bytes that are not UTF-8"):
        read_tasks(path, LETTERS, vocab_size=VOCAB_SIZE)


def test_file_without_examples_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got no examples"):
        read(tmp_path, "", "")


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_tasks(tmp_path / "nowhere.jsonl", LETTERS, vocab_size=VOCAB_SIZE)
