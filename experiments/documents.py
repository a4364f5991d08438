"""Questions over several documents that depend on each other, for caches that are put together of parts.

* `facts`: essay text with a number to remember across every border: one document ends with whose it is, the next begins
  with the number. Read apart, the number does not know its owner.
* `text`: passages of one essay in their order, whose continuation is scored.

All documents have one length, so that what is compiled for one serves all.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from experiments.synthetic import KEYS, chat_frame, digits, sentences, split_essays
from models.tokenizer import Tokenizer

DOCUMENT_TASKS = ("facts", "text")
_HEAD_TOKENS, _QUESTION_TOKENS, _ANSWER_TOKENS, _EDIT_TOKENS = 16, 16, 32, 8


@dataclasses.dataclass(frozen=True)
class Documents:
    """A question over documents, as token ids, and an edit that made them what they are.

    Attributes:
      task: of `DOCUMENT_TASKS`.
      head: what is before the documents, the same for all of them.
      documents: of one length, in order.
      question: what follows them.
      answer: what should come then.
      start: position, among head and documents, where the edit begins.
      stop: where it ends.
      before: what was there before the edit.
    """

    task: str
    head: tuple[int, ...]
    documents: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    start: int
    stop: int
    before: tuple[int, ...]

    @property
    def context(self) -> tuple[int, ...]:
        """Head and documents."""
        return (*self.head, *itertools.chain(*self.documents))

    @property
    def unedited(self) -> tuple[int, ...]:
        """Returns the tokens of the context before the edit."""
        return (*self.context[: self.start], *self.before, *self.context[self.stop :])


def document_tasks(
    tokenizer: Tokenizer,
    essays: Sequence[str],
    *,
    documents: int,
    tokens: int,
    count: int,
    seed: int,
    tasks: Sequence[str] = DOCUMENT_TASKS,
) -> list[Documents]:
    """Makes `count` examples of each task; an example depends on its task, its index and the seed alone.

    Args:
      tokenizer: of the model that will answer.
      essays: natural text, one string a document.
      documents: of every example, at least 2.
      tokens: of every document.
      count: examples of each task.
      seed: of all random choices.
      tasks: which to make.

    Raises:
      ValueError: a count is too small, or documents have no room for a fact.
    """
    if documents < 2 or count < 1 or tokens < 2:
        got = f"{documents}, {count} and {tokens}"
        raise ValueError(f"documents, count and tokens must be at least 2, 1 and 2, got {got}.")
    make = {"facts": _facts, "text": _text}
    held_back, haystack = split_essays(essays)
    ids = tokenizer.encode("\n\n".join(held_back))
    made = []
    for task, index in itertools.product(tasks, range(count)):
        rng = random.Random(f"{seed}/{task}/{index}")
        made.append(make[task](tokenizer, haystack if task == "facts" else ids, documents, tokens, rng))
    return made


def _text(tokenizer: Tokenizer, ids: Sequence[int], documents: int, tokens: int, rng: random.Random) -> Documents:
    size = _HEAD_TOKENS + documents * tokens + _QUESTION_TOKENS + _ANSWER_TOKENS
    if size > len(ids):
        raise ValueError(f"documents: {documents} of {tokens} tokens are more than the {len(ids)} of the essays.")
    start = rng.randrange(len(ids) - size + 1)
    rest = iter(ids[start : start + size])
    take = lambda count: tuple(itertools.islice(rest, count))
    head, parts = (*tokenizer.opening, *take(_HEAD_TOKENS)), tuple(take(tokens) for _ in range(documents))
    question, answer = take(_QUESTION_TOKENS), take(_ANSWER_TOKENS)
    edit = len(head) + tokens + tokens // 2
    other = rng.randrange(len(ids) - 2 * _EDIT_TOKENS)
    before = tuple(ids[other : other + _EDIT_TOKENS + _EDIT_TOKENS // 2])
    stop = min(edit + _EDIT_TOKENS, len(head) + documents * tokens)
    return Documents("text", head, parts, question, answer, edit, stop, before)


def _facts(tokenizer: Tokenizer, essays: Sequence[str], documents: int, tokens: int, rng: random.Random) -> Documents:
    keys = rng.sample(KEYS, documents - 1)
    numbers = [digits(rng, 7) for _ in keys]
    asked = rng.randrange(len(keys))
    head, tail = chat_frame(
        tokenizer,
        "Several documents follow. Make sure to memorize the special magic numbers in them. I will quiz you about one"
        " of the numbers afterwards.\n\n",
        f"\n\nWhat is the special magic number for {keys[asked]} mentioned in the documents?",
    )
    tail += f"The special magic number for {keys[asked]} mentioned in the documents is:"
    opening = () if tokenizer.chat_template else tokenizer.opening
    head_ids = (*opening, *tokenizer.encode(head))
    owners = [tokenizer.encode(f" One of the special magic numbers for {key}") for key in keys]
    values = [tokenizer.encode(f" is: {number}.") for number in numbers]
    filler, parts = sentences(essays, rng), []
    for index in range(documents):
        begins = values[index - 1] if index else []
        ends = owners[index] if index < len(keys) else []
        room = tokens - len(begins) - len(ends)
        if room < 0:
            raise ValueError(f"tokens: documents need at least {tokens - room} tokens for a fact, got {tokens}.")
        parts.append((*begins, *_filled(tokenizer, filler, room), *ends))
    is_, number = tokenizer.encode(" is:"), tokenizer.encode(f" {numbers[asked]}")
    start = len(head_ids) + (asked + 1) * tokens + len(is_)
    before = tuple(tokenizer.encode(f" {digits(rng, 5)}"))
    question = tuple(tokenizer.encode(tail))
    return Documents("facts", head_ids, tuple(parts), question, tuple(number), start, start + len(number), before)


def _filled(tokenizer: Tokenizer, filler: Iterator[str], room: int) -> list[int]:
    """The next sentences, cut to exactly `room` tokens."""
    ids: list[int] = []
    while len(ids) < room:
        ids += tokenizer.encode(next(filler))
    return ids[:room]
