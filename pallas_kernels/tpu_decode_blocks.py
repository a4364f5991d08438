"""How many heads and slots a program of a decode kernel reads at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

from pallas_kernels import block_sizes
from pallas_kernels.block_sizes import Sizes

_TILE_BYTES = 4 << 20
"""Of what one step reads and expands. Two tiles are in flight: within the 16 MB of VMEM that the compilers of all
generations grant a kernel. A step of 4 MB takes 5 us at 819 GB/s (v5e), so what a step costs by itself is small."""

_MOST_SLOTS = 2048  # of a tile: logits and expanded slots of one head stay below 2 MB each
_LANES = 128
_TRIED = 4  # times the heuristic's most slots of a tile are worth a try


class Blocks(NamedTuple):
    """What one step of the grid reads."""

    heads: int  # KV heads; all of them, or a multiple of 8
    slots: int  # all of them, or a multiple of 128
    splits: int  # parts of the slots that run beside one another where a chip has several cores


def blocks(
    kernel: str,
    key: str,
    heads: int,
    slots: int,
    slot_bytes: float,
    expanded_bytes: float = 0.0,
    *,
    step: int = 1,
    most: int | None = None,
) -> Blocks | None:
    """Measured sizes if there are some; else the heuristic, from the size of VMEM.

    Args:
      kernel: that asks, and
      key: for which shapes and dtypes; see `pallas_kernels.block_sizes`.
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
    most = most or _MOST_SLOTS
    ways = (heads, 8) if heads > 8 and heads % 8 == 0 else (heads,)
    fits = {some: min(int(_TILE_BYTES / (some * slot_bytes + expanded_bytes)), most) for some in ways}
    some = next((some for some in ways if fits[some] >= min(slots, step)), None)
    if some is None:
        return None
    candidates = [
        dict(heads=heads, slots=slots, splits=splits)
        for heads in ways
        for slots in block_sizes.doublings(step, _TRIED * most)
        for splits in (1, 2)
    ]
    # Two cores share the slots of a single row; where there is one core, a second part costs nothing.
    default = dict(heads=some, slots=fits[some], splits=2)
    fit = lambda sizes: _fitted(sizes, slots, step)
    return block_sizes.choose(kernel, key, default=default, candidates=candidates, fit=fit)


def _fitted(sizes: Sizes, slots: int, step: int) -> Blocks:
    """Tiles of at most `sizes["slots"]` that part no step."""
    if slots <= sizes["slots"]:
        return Blocks(sizes["heads"], slots, 1)
    tiles = range(sizes["slots"] // step * step, 0, -step)
    # A last tile that reaches over the end has to be masked: one that does not may be up to half as large.
    tile = next((tile for tile in tiles if slots % tile == 0 and 2 * tile >= tiles[0]), tiles[0])
    return Blocks(sizes["heads"], tile, 1 if -(-slots // tile) % sizes["splits"] else sizes["splits"])
