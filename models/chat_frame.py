"""What a chat template writes around a context, a question and the questions that follow."""

from __future__ import annotations

import dataclasses

from models.tokenizer import Tokenizer

_CONTEXT, _QUESTION, _ANSWER, _NEXT = "[[context]]", "[[question]]", "[[answer]]", "[[next]]"


@dataclasses.dataclass(frozen=True)
class ChatFrame:
    """The text around the parts of a conversation about a context.

    What the model reads is `opening`, then `before` context `within` question `after` answer `between` question
    `after` answer, and so on.

    Attributes:
      opening: ids that come first of all; a template writes them by itself.
      before: up to the context.
      within: between the context and the first question, which are one turn.
      after: from a question to its answer.
      between: from an answer, whose stop token is not part of it, to the next question.
    """

    opening: tuple[int, ...]
    before: str
    within: str
    after: str
    between: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatFrame:
        """Returns what the tokenizer's chat template writes; without one, plain text in paragraphs.

        Raises:
          ValueError: the template does not keep what user and assistant say as it is and in order.
        """
        if tokenizer.chat_template is None:
            return cls(tokenizer.opening, before="", within="\n\n", after="\n", between="\n\n")
        first = {"role": "user", "content": f"{_CONTEXT}\n\n{_QUESTION}"}
        one = tokenizer.chat([first], add_generation_prompt=True)
        before, within, after = _cut(one, _CONTEXT, _QUESTION)
        two = [first, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
        *_, between, _ = _cut(tokenizer.chat(two, add_generation_prompt=True), _CONTEXT, _QUESTION, _ANSWER, _NEXT)
        return cls((), before, within, after, between)


def _cut(rendered: str, *marks: str) -> list[str]:
    """Cuts a text at marks that come once each, in this order."""
    parts, rest = [], rendered
    for mark in marks:
        part, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError(
                "tokenizer.chat_template must write what user and assistant say once and in order, got "
                f"{rendered if len(rendered) <= 200 else rendered[:197] + '...'!r}."
            )
        parts.append(part)
    return [*parts, rest]
