"""A task's context opens once with what the tokenizer asks for, whether the text says it or not."""

import json
import types

import pytest

from experiments.benchmarks.task_files import read_tasks

BOS = ord("^")
LETTERS = types.SimpleNamespace(chat_template=None, opening=(BOS,), encode=lambda text: [ord(x) for x in text])


@pytest.mark.parametrize("context, ids", [("ab", (BOS, 97, 98)), ("^ab", (BOS, 97, 98)), ("^^a", (BOS, BOS, 97))])
def test_a_context_opens_once(tmp_path, context, ids):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"task": "t", "context": context, "question": "^c"}))
    (example,) = read_tasks(path, LETTERS, vocab_size=128)
    assert example.context_ids == ids and example.question_ids == (BOS, 99)
