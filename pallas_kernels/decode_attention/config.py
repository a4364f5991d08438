"""How many heads and slots a program of a decode kernel reads at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

_TILE_BYTES = 4 << 20
"""Of what one step reads and expands. Two tiles are in flight: within the 16 MB of VMEM that the compilers of all
generations grant a kernel. A step of 4 MB takes 5 us at 819 GB/s (v5e), so what a step costs by itself is small."""

_MOST_SLOTS = 2048  # of a tile: logits and expanded slots of one head stay below 2 MB each
_LANES = 128


class Blocks(NamedTuple):
    """What one step of the grid reads."""

    heads: int  # KV heads; all of them, or a multiple of 8
    slots: int  # all of them, or a multiple of 128
    splits: int  # parts of the slots that run beside one another where a chip has several cores


def blocks(
    heads: int,
    slots: int,
    slot_bytes: float,
    expanded_bytes: float = 0.0,
    *,
    step: int = 1,
    most: int | None = None,
) -> Blocks | None:
    """The heuristic, from the size of VMEM.

    Args:
      heads: KV heads that are stored.
      slots: [S].
      slot_bytes: bytes that a slot of one KV head takes in VMEM.
      expanded_bytes: what is made of a slot there; it exists for one head at a time.
      step: slots that cannot be parted: of words and of groups, with the rows that a block must have of both.
      most: slots of a tile. None: 2,048.

    Returns:
      None where not even the smallest tile fits.
    """
    step = math.lcm(step, _LANES)
    for some in (heads, 8) if heads > 8 and heads % 8 == 0 else (heads,):
        fits = min(int(_TILE_BYTES / (some * slot_bytes + expanded_bytes)), most or _MOST_SLOTS)
        if slots <= fits:
            return Blocks(some, slots, 1)
        if fits >= step:
            sizes = range(fits // step * step, 0, -step)
            # A last tile that reaches over the end has to be masked: one that does not may be up to half as large.
            size = next((size for size in sizes if slots % size == 0 and 2 * size >= sizes[0]), sizes[0])
            tiles = -(-slots // size)
            # Two cores share the slots of a single row; where there is one core, a second part costs nothing.
            return Blocks(some, size, 2 if tiles % 2 == 0 else 1)
    return None
