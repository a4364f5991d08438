"""Byte-pair merges of vocabularies that store only their pieces and how soon each is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Piece = TypeVar("Piece", str, bytes)


def merges_of(order: Mapping[Piece, float]) -> list[tuple[Piece, Piece]]:
    """All pairs of pieces that make a third, those that make the first of the order first.

    Where several pairs make the same piece, the one of the earlier left piece comes first, then of the earlier right.

    Args:
      order: of every piece, low is made first: a rank, or a score with its sign changed.
    """
    pairs = []
    for piece, at in order.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in order and right in order:
                pairs.append((at, order[left], order[right], left, right))
    pairs.sort(key=lambda pair: pair[:3])
    return [pair[3:] for pair in pairs]


def check_lengths(**lists: Sequence) -> None:
    """Refuses lists about the pieces of a vocabulary that are not as long as each other.

    Raises:
      ValueError: names the lists and their lengths.
    """
    if len({len(x) for x in lists.values()}) > 1:
        raise ValueError(", ".join(f"{name} has {len(x)} entries" for name, x in lists.items()) + ": expected as many.")
