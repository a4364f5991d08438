"""Methods made of methods: the config of one after the other, and the budget that brings it to a size."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from experiments.methods import METHODS_DIR

_TRANSFORM = re.compile(r"^method\.transform = @(\w+)\(\)$", re.MULTILINE)
_PAGE = 32  # slots: whole groups of every quantizer
_FEWEST = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the context: the first of these that a method's window fits in


def compose_configs(names: Sequence[str]) -> str:
    """The config of several methods of configs/methods, applied in order.

    Raises:
      ValueError: they cannot stand in one config: a method that is a composition itself, two that are calibrated, one
        that reads its prompt in chunks, or the same one twice.
    """
    parts, transforms = [], []
    for name in names:
        text = (METHODS_DIR / f"{name}.gin").read_text(encoding="utf-8")
        found = _TRANSFORM.search(text)
        if found is None or found[1] == "compose" or "method.prefill_chunk" in text:
            raise ValueError(f"{name} cannot be a part of a composition: it is one, or reads its prompt in chunks.")
        transforms.append(found[1])
        lines = [line for line in text.splitlines() if line and not line.startswith(("#", "method."))]
        if len(names) > 1:
            lines = [f"{found[1]}.page = {_PAGE}" if line.startswith(f"{found[1]}.page = ") else line for line in lines]
        parts += lines
    if sum(line.startswith("calibration.recipe") for line in parts) > 1:
        raise ValueError(f"{', '.join(names)}: more than one is calibrated, and a config holds one calibration.")
    if len(set(transforms)) < len(transforms):
        raise ValueError(f"{', '.join(names)}: one transform twice, and a config binds it once.")
    calls = ", ".join(f"@{name}()" for name in transforms)
    head = [f"method.transform = {calls}"]
    if len(names) > 1:
        head = ["method.transform = @compose()", f"compose.transforms = [{calls}]"]
    return "\n".join([*head, *parts]) + "\n"


def has_budget(text: str) -> bool:
    """Whether a config uses `%budget`."""
    return "%budget" in text


def keep_for_ratio(bytes_at: Callable[[float], int], full_bytes: int, ratio: float) -> float | None:
    """The largest fraction of the context whose cache is `ratio` times smaller; None where not even a small one is.

    Bytes grow nearly linearly with the fraction, in steps of pages and groups.

    Raises:
      ValueError: the method can be built with no fraction.
    """
    target = full_bytes / ratio
    high = 1.0
    for low in _FEWEST:
        try:
            at_low = bytes_at(low)
            break
        except ValueError:  # less than what it always keeps
            if low == _FEWEST[-1]:
                raise
    if at_low > target:
        return None
    at_high = bytes_at(0.99)
    if at_high <= target:
        return 0.99
    for _ in range(4):
        middle = low + (high - low) * (target - at_low) / (at_high - at_low)
        middle = min(max(middle, low + 0.005), high - 0.005)
        size = bytes_at(middle)
        if size <= target:
            low, at_low = middle, size
        else:
            high, at_high = middle, size
        if high - low < 0.01 or target - at_low < 0.01 * target:
            break
    return int(low * 1000) / 1000
