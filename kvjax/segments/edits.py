"""What may be changed about slots after they were written: where they are, and whether they are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from kvjax.rope import Rope


class Edit(NamedTuple):
    """Gives slots other positions, or empties them: what `AnySegment.edited` takes.

    Attributes:
      position: i32[...] positions of occupied slots to their new ones; below 0 empties a slot.
      moves: whether any slot that stays gets another position.
      alike: whether all slots move by the same number of tokens and none is emptied.
      rope: turns rotated keys from their old position to the new one; None: none of these keys are rotated, or none
        moves.
      reencode: keys that are codes are decoded, turned and encoded again, instead of refused.
    """

    position: Callable[[jax.Array], jax.Array]
    moves: bool = False
    alike: bool = False
    rope: Rope | None = None
    reencode: bool = False
