"""Questions about long contexts.

An example is a context, which is prefilled and compressed, a question, which follows, and an answer.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from experiments.benchmarks.metrics import METRICS


class Tokenizer(Protocol):
    """What a tokenizer must offer here."""

    chat_template: str | None
    opening: tuple[int, ...]  # what a text without the template must open with

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str: ...


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one context.

    Attributes:
      task: name under which results are averaged.
      context_ids: tokens to prefill and compress; never empty.
      question_ids: tokens that follow; may be empty.
      answer_ids: tokens whose likelihood is measured; may be empty.
      references: texts that a generated one is compared with; empty where nothing is generated.
      metric: of `benchmarks.metrics.METRICS`, which compares them.
      new_tokens: that are generated at most.
      stops: texts before which a generated one ends.
      classes: that the metric `classification` knows.
      depth: where the fact lies, 0 at the start of the documents and 1 at their end; None where there is none.
      length: tokens of context that the task was made for; None: the context has a length of its own.
    """

    task: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    metric: str | None = None
    new_tokens: int = 0
    stops: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    depth: float | None = None
    length: int | None = None

    @property
    def generates(self) -> bool:
        """Whether a text is generated and scored."""
        return bool(self.references)

    @property
    def tokens_after(self) -> int:
        """The most tokens that follow the context."""
        return len(self.question_ids) + max(len(self.answer_ids), self.new_tokens)

    def score(self, prediction: str) -> float:
        """Returns what the task's metric says of a generated text, from 0 to 1."""
        return METRICS[self.metric](prediction, self.references, self.classes)


def first_of_each(examples: Sequence[Example], count: int | None) -> list[Example]:
    """Selects the first `count` examples of each task and length, in their order; None: all."""
    taken: dict[tuple[str, int | None], int] = {}
    selected = []
    for example in examples:
        kind = example.task, example.length
        taken[kind] = taken.get(kind, 0) + 1
        if count is None or taken[kind] <= count:
            selected.append(example)
    return selected
