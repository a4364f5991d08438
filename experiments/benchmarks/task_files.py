"""Task files: one JSON object a line, of one's own or as LongBench publishes them.

docs/evaluating.md describes the format.
"""

import codecs
import dataclasses
import json
import os
import reprlib
from typing import Any

from experiments import tasks
from experiments.benchmarks import longbench
from experiments.benchmarks.metrics import METRICS
from experiments.suggestions import nearest, there_are
from experiments.tasks import Example, Tokenizer

MORE_TOKENS = 16
"""How much longer than the longest reference a generated text may be, where its line says nothing of it."""

_TEXTS = ("context", "context_ids", "question", "question_ids", "answer", "answer_ids")
_FIELDS = ("task", *_TEXTS, "answers", "metric", "max_new_tokens", "stop", "classes", "depth", "turns", "multi_turn")


def read_tasks(
    path: str | os.PathLike[str], tokenizer: Tokenizer, *, vocab_size: int, max_examples: int | None = None
) -> list[Example]:
    """Reads a task file.

    A line has `task`; `context` or `context_ids`; optionally `question` or `question_ids` (may be empty); optionally
    `answer` or `answer_ids`, whose likelihood is measured, and `answers`, texts that what the model writes is compared
    with (without them, with the answer). How it is compared: `metric` (see `METRICS`; match_part by default),
    `max_new_tokens`, `stop` (texts that end what is written) and `classes`. `turns` is a list of questions with answers
    about one context; with `"multi_turn": true` each sees the questions and right answers before it, without it the
    context alone. Texts are encoded as they stand, without a chat template; a context opens as the tokenizer says,
    once.

    A line of LongBench, with `input`, `context`, `answers` and `dataset`, becomes such a line: see `longbench`.

    Other fields are ignored, and so are blank lines; but one whose name is nearly that of a field which the line lacks
    is refused as misspelled. Every line is checked, also those beyond `max_examples`.

    Args:
      path: the file, UTF-8, with or without a byte order mark.
      tokenizer: encodes the text forms.
      vocab_size: of the model; ids are below it.
      max_examples: keep this many examples of each task, the first in the file; None keeps all.

    Returns:
      The examples in file order.

    Raises:
      ValueError: for a bad line, naming file, line and field; for a file without examples; for `max_examples` < 1.
      OSError: if the file cannot be opened.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples: got {max_examples}, expected at least 1")
    examples: list[Example] = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not raw.strip():
                continue
            where = f"{os.fspath(path)}, line {number}"
            line = _load(raw, where)
            if longbench.is_line(line):
                line = longbench.as_task(line, where)
            examples += _parse(line, tokenizer, vocab_size, where)
    if not examples:
        raise ValueError(f"{os.fspath(path)}: got no examples, expected one JSON object a line")
    return tasks.first_of_each(examples, max_examples)


def _load(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: got bytes that are not UTF-8 ({error.reason}), expected JSON text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}), expected one object") from None
    except RecursionError:
        raise ValueError(f"{where}: got brackets nested too deeply, expected one JSON object") from None
    except ValueError:  # of Python's limit on the digits of an integer
        raise ValueError(f"{where}: got a number of thousands of digits, expected token ids") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {reprlib.repr(value)}, expected a JSON object")
    return value


def _parse(line: dict[str, Any], tokenizer: Tokenizer, vocab_size: int, where: str) -> list[Example]:
    """The examples of a line: one, or one for each of its turns."""
    _check_names(line, where)
    task = line.get("task")
    if not isinstance(task, str) or not task:
        raise ValueError(f"{where}: task: got {reprlib.repr(task)}, expected a non-empty string")
    _check_text(task, "task", where)
    context = _ids(line, "context", tokenizer, vocab_size, where)
    if context is None:
        raise ValueError(f"{where}: context: got neither context nor context_ids, expected one of them")
    if not context:
        raise ValueError(f"{where}: context: got an empty prompt, expected at least one token")
    multi_turn = line.get("multi_turn")
    if multi_turn not in (None, True, False) or multi_turn is not None and "turns" not in line:
        raise ValueError(f"{where}: multi_turn: got {reprlib.repr(multi_turn)}, expected true or false, beside turns")
    if line.get("turns") is None:
        return [_asked(line, line, task, context, (), tokenizer, vocab_size, where)]
    turns = line["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: turns: got {reprlib.repr(turns)}, expected a list of objects with a question")
    examples, before = [], ()
    for number, turn in enumerate(turns):
        of_turn = f"{where}: turns[{number}]"
        _check_names(turn, of_turn)
        example = _asked(turn, line, task, context, before, tokenizer, vocab_size, of_turn)
        examples.append(example)
        if multi_turn:
            before = example.question_ids + example.answer_ids
    return examples


def _asked(
    asked: dict[str, Any],
    line: dict[str, Any],
    task: str,
    context: tuple[int, ...],
    before: tuple[int, ...],
    tokenizer: Tokenizer,
    vocab_size: int,
    where: str,
) -> Example:
    """The example of a question with its answer, in a line or in one of its turns; `before` comes before it."""
    answer = _ids(asked, "answer", tokenizer, vocab_size, where)
    if answer is not None and not answer:
        raise ValueError(f"{where}: answer: got an empty answer, expected at least one token, or no answer field")
    question = _ids(asked, "question", tokenizer, vocab_size, where) or ()
    references = _strings(asked, "answers", where)
    if references == ():
        raise ValueError(f"{where}: answers: got an empty list, expected at least one text, or no answers field")
    if references and answer is None:
        answer = tuple(tokenizer.encode(references[0])) if references[0] else ()
    if references is None:
        references = () if answer is None else (asked.get("answer") or tokenizer.decode(answer),)
    example = Example(task, context, before + question, answer or (), references, depth=_depth(line, where))
    if not references:
        return example
    metric = _first(asked, line, "metric") or "match_part"
    if not isinstance(metric, str) or metric not in METRICS:
        known = there_are(metric, METRICS) if isinstance(metric, str) else f"there are {', '.join(METRICS)}."
        raise ValueError(f"{where}: metric: unknown metric {reprlib.repr(metric)}; {known}")
    classes = _strings(asked if asked.get("classes") is not None else line, "classes", where) or ()
    if metric == "classification" and not classes:
        raise ValueError(f"{where}: classes: got none, expected the names that the metric classification knows")
    new_tokens = _first(asked, line, "max_new_tokens")
    if new_tokens is None:
        new_tokens = max([len(answer), *(len(tokenizer.encode(text)) for text in references)]) + MORE_TOKENS
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or not 1 <= new_tokens <= 2**20:
        raise ValueError(f"{where}: max_new_tokens: got {reprlib.repr(new_tokens)}, expected a number of tokens")
    stops = _strings(asked if asked.get("stop") is not None else line, "stop", where) or ()
    if "" in stops:
        raise ValueError(f"{where}: stop: got an empty text, expected what ends a generated one")
    return dataclasses.replace(example, metric=metric, new_tokens=new_tokens, stops=stops, classes=classes)


def _first(asked: dict[str, Any], line: dict[str, Any], field: str) -> Any:
    """A field of a turn, or of its line."""
    return asked[field] if asked.get(field) is not None else line.get(field)


def _depth(line: dict[str, Any], where: str) -> float | None:
    depth = line.get("depth")
    if depth is None:
        return None
    if not isinstance(depth, (int, float)) or isinstance(depth, bool) or not 0 <= depth <= 1:
        raise ValueError(f"{where}: depth: got {reprlib.repr(depth)}, expected a number from 0 to 1")
    return float(depth)


def _strings(line: dict[str, Any], field: str, where: str) -> tuple[str, ...] | None:
    """A list of texts; one text is a list of it; None where the field is absent."""
    texts = line.get(field)
    if texts is None:
        return None
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {field}: got {reprlib.repr(texts)}, expected a list of strings")
    for text in texts:
        _check_text(text, field, where)
    return tuple(texts)


def _check_names(line: dict[str, Any], where: str) -> None:
    """Refuses a field that is nearly one of `_FIELDS`, where the line has neither form of that one."""
    given = {name.removesuffix("_ids") for name in _FIELDS if line.get(name) is not None}
    for name, value in line.items():
        meant = None if name in _FIELDS else nearest(name, _FIELDS)
        if meant is None or meant.removesuffix("_ids") in given:
            continue
        if isinstance(value, list) or not meant.endswith("_ids"):  # a `question_id` is a name, no list of tokens
            raise ValueError(f"{where}: unknown field {reprlib.repr(name)}; did you mean {meant!r}?")


def _check_text(text: str, field: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{where}: {field}: got half of a surrogate pair ({code} at character {error.start}), expected text"
        ) from None


def _ids(
    line: dict[str, Any], field: str, tokenizer: Tokenizer, vocab_size: int, where: str
) -> tuple[int, ...] | None:
    """Returns the tokens of a field given as text or as `<field>_ids`; None where neither form is there."""
    text, ids = line.get(field), line.get(f"{field}_ids")
    if text is not None and ids is not None:
        raise ValueError(f"{where}: {field}: got both {field} and {field}_ids, expected one of them")
    if text is not None:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {field}: got {reprlib.repr(text)}, expected a string")
        _check_text(text, field, where)
        opening, ids = tokenizer.opening if field == "context" else (), tuple(tokenizer.encode(text))
        return ids if ids[: len(opening)] == opening else (*opening, *ids)
    if ids is None:
        return None
    if not isinstance(ids, list):
        raise ValueError(f"{where}: {field}_ids: got {reprlib.repr(ids)}, expected a list of token ids")
    for index, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(
                f"{where}: {field}_ids[{index}]: got {reprlib.repr(token)}, expected an integer from 0 to"
                f" {vocab_size - 1}"
            )
    return tuple(ids)
