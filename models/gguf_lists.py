"""Lists and token ids in the metadata of GGUF files, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {str: "strings", int: "integers", float: "numbers"}


def read_list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """Returns the list `tokenizer.ggml.{key}`.

    Raises:
      ValueError: it is missing, no list, or has entries of another kind.
    """
    name, expected = f"tokenizer.ggml.{key}", f"expected a list of {_KINDS[kind]}"
    if name not in metadata:
        raise ValueError(f"{name} is missing, {expected}.")
    given = metadata[name]
    if not isinstance(given, list):
        raise ValueError(f"{name} is {given!r}, {expected}.")
    allowed = (int, float) if kind is float else kind
    for i, entry in enumerate(given):
        if not isinstance(entry, allowed):
            raise ValueError(f"{name} has {entry!r} at {i}, {expected}.")
    return given


def read_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    """Returns the id `tokenizer.ggml.{key}_token_id`, or None where the file has none.

    Raises:
      ValueError: it is no id of a vocabulary of this size.
    """
    name = f"tokenizer.ggml.{key}_token_id"
    given = metadata.get(name)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < size):
        shown = f"a list of {len(given)}" if isinstance(given, list) else repr(given)
        raise ValueError(f"{name} is {shown}, expected one token id from 0 to {size - 1}.")
    return given
