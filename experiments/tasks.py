"""Questions about long contexts, and the file that holds them.

An example is a context, which is prefilled and compressed, a question, which follows, and an answer.
"""

import codecs
import dataclasses
import json
import os
import reprlib
from collections.abc import Sequence
from typing import Any, Protocol

from experiments.suggestions import nearest

_FIELDS = ("task", "context", "context_ids", "question", "question_ids", "answer", "answer_ids")


class Tokenizer(Protocol):
    """What a tokenizer must offer here."""

    chat_template: str | None
    opening: tuple[int, ...]  # what a text without the template must open with

    def encode(self, text: str) -> list[int]: ...
    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str: ...


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one context.

    Attributes:
      task: name under which results are averaged.
      context_ids: tokens to prefill and compress; never empty.
      question_ids: tokens that follow; may be empty.
      answer_ids: tokens whose likelihood is measured; empty where the file gives no answer.
      scored: whether greedy decoding is compared with `answer_ids`.
      depth: where the fact lies, 0 at the start of the documents and 1 at their end; None where there is none.
    """

    task: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    scored: bool
    depth: float | None = None


def read_tasks(
    path: str | os.PathLike[str], tokenizer: Tokenizer, *, vocab_size: int, max_examples: int | None = None
) -> list[Example]:
    """Reads a task file: one JSON object a line.

    Fields: `task`; `context` or `context_ids`; optionally `question` or `question_ids` (may be empty); optionally
    `answer` or `answer_ids`. Texts are encoded as they stand, without a chat template; a context opens as the
    tokenizer says, once. Other fields are ignored, and so are blank lines; but one whose name is nearly that of a field
    which the line lacks is refused as misspelled. Every line is checked, also those beyond `max_examples`.

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
            examples.append(_parse(_load(raw, where), tokenizer, vocab_size, where))
    if not examples:
        raise ValueError(f"{os.fspath(path)}: got no examples, expected one JSON object a line")
    return first_of_each(examples, max_examples)


def first_of_each(examples: Sequence[Example], count: int | None) -> list[Example]:
    """Selects the first `count` examples of each task, in their order; None: all."""
    taken: dict[str, int] = {}
    selected = []
    for example in examples:
        taken[example.task] = taken.get(example.task, 0) + 1
        if count is None or taken[example.task] <= count:
            selected.append(example)
    return selected


def _load(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
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


def _parse(line: dict[str, Any], tokenizer: Tokenizer, vocab_size: int, where: str) -> Example:
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
    answer = _ids(line, "answer", tokenizer, vocab_size, where)
    if answer is not None and not answer:
        raise ValueError(f"{where}: answer: got an empty answer, expected at least one token, or no answer field")
    question = _ids(line, "question", tokenizer, vocab_size, where)
    return Example(task, context, question or (), answer or (), scored=answer is not None)


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
    """The tokens of a field given as text or as `<field>_ids`; None where neither form is there."""
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
