"""The names of the axes of segments, and where slots lie in their arrays."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from pallas_kernels import encoded

OF_SLOTS = P("batch", "kv_heads", "slots")
"""[B, K, S, ...]."""

OF_SLOTS_LAST = P("batch", "kv_heads", None, "slots")
"""[B, K, n, S]: n numbers of each slot, the slots minor."""


def rename(named: Any, names: dict[str, str | None]) -> Any:
    """Replaces some names in a tree of them."""
    return jax.tree.map(lambda spec: P(*(names.get(name, name) for name in spec)), named)


def replicated_slots(named: Any) -> Any:
    """Names slots that no rule splits: few, and written at every step."""
    return rename(named, {"slots": "tail"})


def heads_alike(named: Any, *parts: Any) -> Any:
    """Splits no part by KV head if one of them is not: queries come for all heads or for some."""
    by_head = lambda part: any("kv_heads" in spec for spec in jax.tree.leaves(part))
    return named if all(map(by_head, parts)) else rename(named, {"kv_heads": None})


def slot_axis(spec: P) -> int:
    """Returns the axis along which slots lie; -1 where there is none."""
    return next((axis for axis, name in enumerate(spec) if name in ("slots", "tail")), -1)


def cut_slots(tree: Any, named: Any, slots: int, start: jax.Array | int, size: int, block: int) -> Any:
    """Cuts `size` slots from `start` on out of every array: a tile.

    Args:
      tree: of arrays with an entry for each of S slots, or with some entries for every `block` of them.
      named: the same tree of the names of axes.
      slots: [S].
      start: a multiple of `block`; may be traced, and i32[B].
      size: another.
      block: slots of the smallest piece that can be cut.
    """

    def part(x, spec):
        axis = slot_axis(spec)
        if axis < 0:
            return x
        entries = x.shape[axis] * block // slots  # of a block
        return encoded.cut_slots(x, start // block * entries, size // block * entries, axis=axis)

    return jax.tree.map(part, tree, named)
