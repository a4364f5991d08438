"""The names of the axes of segments."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

OF_SLOTS = P("batch", "kv_heads", "slots")
"""[B, K, S, ...]."""


OF_TAIL = P("batch", "kv_heads", "tail")
"""The same for slots that no rule splits: few, and written at every step."""


def rename(named: Any, names: dict[str, str | None]) -> Any:
    """A tree of names with some of them replaced."""
    return jax.tree.map(lambda spec: P(*(names.get(name, name) for name in spec)), named)


def heads_alike(named: Any, *parts: Any) -> Any:
    """A tree of names in which no part is split by KV head if one of them is not: queries come for all or for some."""
    by_head = lambda part: any("kv_heads" in spec for spec in jax.tree.leaves(part))
    return named if all(map(by_head, parts)) else rename(named, {"kv_heads": None})


def slot_axis(spec: P) -> int:
    """The axis along which slots lie; -1 where there is none."""
    return next((axis for axis, name in enumerate(spec) if name in ("slots", "tail")), -1)
