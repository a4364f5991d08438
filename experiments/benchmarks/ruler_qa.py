"""RULER's questions about documents, from data that the user has: SQuAD, HotpotQA, or lines of one's own.

Documents that answer a question lie among others of the same data, as many as fit, in random order. `qa_1` stands for
SQuAD (https://rajpurkar.github.io/SQuAD-explorer, dev-v2.0.json) and `qa_2` for HotpotQA (its development set with
distractors), but either takes any of these forms:

* `.json` of SQuAD: `{"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}]}]}]}]}`, without
  the questions that are marked impossible;
* `.json` of HotpotQA: `[{"question", "answer", "context": [[title, [sentence, ...]], ...]}]`;
* `.jsonl`, one object a line: `question`, `answers` (a list of texts), `documents` (a list of those that answer it).

Source: Hsieh et al., RULER (2024), arXiv:2404.06654, and its repository, NVIDIA/RULER.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import reprlib
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks import ruler
from experiments.tasks import Example, Tokenizer

TASKS = ("qa_1", "qa_2")
_NEW_TOKENS = 32
_INTRO = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about documents.

    Attributes:
      text: of the question.
      answers: any of which is right.
      documents: that answer it, by their numbers.
      related: further ones of the same article, which are put beside them first.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


def examples(
    task: str, path: str | os.PathLike[str], tokenizer: Tokenizer, *, length: int, count: int, seed: int
) -> list[Example]:
    """Makes examples of the first questions of a file, each with as many documents as fit.

    Args:
      task: its name.
      path: of the data.
      tokenizer: of the model that will answer.
      length: tokens of a prompt with its answer.
      count: of examples, at most.
      seed: of all random choices, with the task and the number of the example.

    Raises:
      ValueError: the file is none of these forms, or a question's own documents do not fit into the length.
      OSError: it cannot be read.
    """
    questions, documents = read(path)
    made = []
    for index, question in enumerate(questions[:count]):
        rng = random.Random(f"{seed}/{task}/{length}/{index}")
        make = lambda size, rng, question=question: _prompt(question, documents, size, rng)
        how = dict(length=length, new_tokens=_NEW_TOKENS, metric="match_part", least=len(question.documents))
        made.append(ruler.fitted(task, tokenizer, make, rng, **how))
    return made


def read(path: str | os.PathLike[str]) -> tuple[list[Question], list[str]]:
    """Reads questions, and all documents of the data, sorted.

    Raises:
      ValueError: the file is none of the forms of this module, naming file and, of lines, the line.
      OSError: it cannot be read.
    """
    name = os.fspath(path)
    raw = pathlib.Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: got bytes that are not UTF-8 ({error.reason}), expected JSON") from None
    lines = text.splitlines() if pathlib.Path(path).suffix == ".jsonl" else [text]
    asked: list[tuple[str, list[str], list[str], list[str]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}" if len(lines) > 1 else name
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        try:
            asked += _asked(value)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{where}: got {reprlib.repr(value)}, expected SQuAD, HotpotQA, or a line with question, answers and"
                " documents"
            ) from None
    if not asked:
        raise ValueError(f"{name}: got no questions, expected at least one")
    documents = sorted({document for _, _, own, related in asked for document in (*own, *related)})
    index = {document: i for i, document in enumerate(documents)}
    numbers = lambda some: tuple(index[document] for document in dict.fromkeys(some))
    return [Question(q, tuple(a), numbers(own), numbers(related)) for q, a, own, related in asked], documents


def _asked(value: Any) -> list[tuple[str, list[str], list[str], list[str]]]:
    """Question, answers, its documents and related ones, of a file of SQuAD or HotpotQA, or of one line."""
    if isinstance(value, dict) and "data" in value:
        found = []
        for article in value["data"]:
            texts = [paragraph["context"] for paragraph in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                own = [paragraph["context"]]
                related = [text for text in texts if text not in own]
                found += [
                    (asked["question"], [answer["text"] for answer in asked["answers"]], own, related)
                    for asked in paragraph["qas"]
                    if not asked.get("is_impossible", False)
                ]
    elif isinstance(value, list):
        found = [
            (
                asked["question"],
                [asked["answer"]],
                [f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]],
                [],
            )
            for asked in value
        ]
    else:
        found = [(value["question"], value["answers"], value["documents"], [])]
    for question, answers, own, _ in found:
        texts = [question, *answers, *own]
        if not answers or not own or isinstance(answers, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError
    return found


def _prompt(question: Question, documents: Sequence[str], size: int, rng: random.Random) -> ruler.Prompt:
    """Size: documents, those of the question among them; all again where the data have fewer."""
    more = size - len(question.documents)
    if size >= len(documents):
        chosen = [i % len(documents) for i in range(size)]
    elif more <= len(question.related):
        chosen = [*question.documents, *rng.sample(question.related, more)]
    else:
        beside = {*question.documents, *question.related}
        others = [i for i in range(len(documents)) if i not in beside]
        chosen = [*question.documents, *question.related, *rng.sample(others, more - len(question.related))]
    rng.shuffle(chosen)
    listed = "\n\n".join(f"Document {i}:\n{documents[which]}" for i, which in enumerate(chosen, start=1))
    return ruler.Prompt(
        f"{_INTRO}\n\nThe following are given documents.\n\n{listed}\n\n",
        f"{_INTRO}\n\nQuestion: {question.text}",
        " Answer:",
        f" {question.answers[0]}",
        question.answers,
    )
