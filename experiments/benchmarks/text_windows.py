"""Perplexity of a text: windows whose beginning is compressed and whose end is predicted."""

from __future__ import annotations

import os
import pathlib

from experiments.tasks import Example, Tokenizer

PREDICTED = 256
"""Tokens at the end of a window, whose likelihood is measured."""


def read_windows(path: str | os.PathLike[str], tokenizer: Tokenizer, *, length: int, count: int) -> list[Example]:
    """Cuts a text into windows: `length` tokens of context, and 256 more that are predicted from it.

    Windows follow each other without overlap, evenly spread over the text where it has more than are wanted. Each opens
    as the tokenizer says. The task is called like the file, and its perplexity is `exp(nll)`.

    Args:
      path: of a text in UTF-8.
      tokenizer: of the model.
      length: tokens of a context.
      count: windows at most.

    Raises:
      ValueError: the text is too short for one window, or is not UTF-8.
      OSError: it cannot be read.
    """
    name = os.fspath(path)
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: got bytes that are not UTF-8 ({error.reason}), expected a text") from None
    ids, opening = tuple(tokenizer.encode(text)), tuple(tokenizer.opening)
    body = length - len(opening)
    size = body + PREDICTED
    fit = len(ids) // size
    if body < 1 or not fit:
        least, most = len(opening) + 1, len(ids) + len(opening) - PREDICTED
        expected = f"a context of {least} to {most}" if most >= least else f"a text of more than {PREDICTED} tokens"
        raise ValueError(
            f"--context: {name} has {len(ids)} tokens, so a window of {length} and {PREDICTED} predicted ones does not"
            f" fit, expected {expected}"
        )
    used = min(count, fit)
    starts = [size * (window * fit // used) for window in range(used)]
    task = pathlib.Path(path).stem
    return [
        Example(task, opening + ids[at : at + body], (), ids[at + body : at + size], length=length) for at in starts
    ]
