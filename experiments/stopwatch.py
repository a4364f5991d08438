"""How benchmarks take time: one call at a time, or several candidates in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call took, and what it returned; the call itself must wait for its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def in_turn(candidates: Mapping[str, Callable[[], tuple]], repeats: int) -> dict[str, tuple]:
    """Runs each candidate once to compile and warm up, then all in turn `repeats` times.

    Noise of a shared machine then falls on all of them alike.

    Args:
      candidates: by name, functions that return (seconds of a prefill, seconds of the decoding, result).
      repeats: timed runs of each.

    Returns:
      The same triple for each: medians of the seconds, and the result of the first timed run.
    """
    seen: dict[str, list[tuple]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, candidate in candidates.items():
            timed = candidate()
            if repeat:
                seen[name].append(timed)
    return {
        name: (*(statistics.median(run[i] for run in runs) for i in (0, 1)), runs[0][2])
        for name, runs in seen.items()
    }
