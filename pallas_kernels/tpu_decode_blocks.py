"""How many heads and slots a program of a decode kernel reads at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

from pallas_kernels import block_sizes
from pallas_kernels.block_sizes import Sizes
from pallas_kernels.tpu_device import tpu_device

_TILE_BYTES = 5 << 20
"""Of what one step reads. That takes 6 us at 819 GB/s (v5e), so what a step costs by itself is small, and so is what
the first tile of a row takes, during which nothing is computed."""

_MOST_SLOTS = 4096  # of a tile
_TOGETHER = 1 << 14
"""Slots, of eight queries each and counted for every head, that are attended to as one: enough to hide what one head
waits for, and few enough for the compiler to take a second or two."""

_SHARE = 0.75  # of VMEM; the rest is for queries, results, sums and what the compiler sets aside
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
    rows: int = 8,
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
      expanded_bytes: what is made of a slot there; it exists for as many heads as are attended to together.
      rows: queries of a KV head.
      step: slots that cannot be parted: of words and of groups, with the rows that a block must have of both.
      most: slots of a tile. None: 4,096.

    Returns:
      None where not even the smallest tile fits.
    """
    step = math.lcm(step, _LANES)
    most = most or _MOST_SLOTS
    ways = (heads, 8) if heads > 8 and heads % 8 == 0 else (heads,)
    device = tpu_device()

    def fits(some: int, tile: int) -> bool:
        read, expanded = some * slot_bytes * tile, heads_together(some, tile, rows) * expanded_bytes * tile
        smallest = some == ways[-1] and tile <= step
        return 2 * read + expanded <= _SHARE * device.vmem_bytes and (read <= _TILE_BYTES or smallest)

    found = {}  # by heads, the largest tile of whole steps; of all slots where they are fewer than a step
    for some in ways:
        tiles = [tile for tile in (*range(max(most // step, 1) * step, 0, -step), slots) if fits(some, tile)]
        found[some] = next((tile for tile in tiles if tile >= min(slots, step)), 0)
    some = next((some for some in ways if found[some]), None)
    if some is None:
        return None
    candidates = [
        dict(heads=heads, slots=slots, splits=splits)
        for heads in ways
        for slots in block_sizes.doublings(step, _TRIED * most)
        for splits in (1, 2)
    ]
    # Several cores share the slots of a single row.
    default = dict(heads=some, slots=found[some], splits=device.cores)
    fit = lambda sizes: _fitted(sizes, slots, step)
    return block_sizes.choose(kernel, key, default=default, candidates=candidates, fit=fit)


def heads_together(heads: int, slots: int, rows: int) -> int:
    """How many heads of a tile are attended to as one.

    Args:
      heads: of the tile.
      slots: of the tile.
      rows: queries of a KV head.
    """
    most = _TOGETHER * 8 // (slots * max(rows, 8))
    return next(n for n in range(min(heads, max(most, 1)), 0, -1) if heads % n == 0)


def _fitted(sizes: Sizes, slots: int, step: int) -> Blocks:
    """Tiles of at most `sizes["slots"]` that part no step."""
    if slots <= sizes["slots"]:
        return Blocks(sizes["heads"], slots, 1)
    tiles = range(sizes["slots"] // step * step, 0, -step)
    # A last tile that reaches over the end has to be masked: one that does not may be up to half as large.
    tile = next((tile for tile in tiles if slots % tile == 0 and 2 * tile >= tiles[0]), tiles[0])
    return Blocks(sizes["heads"], tile, 1 if -(-slots // tile) % sizes["splits"] else sizes["splits"])
