"""Which transforms may follow which: by what they make of slots, and by what they can work on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

SLOTS = {
    "plain": "plain slots, each layer with tokens of its own",
    "by_head": "plain slots, each head with tokens of its own",
    "ring": "a ring that overwrites its oldest",
    "packed": "packed codes",
    "paged": "pages of a pool that heads share",
    "projected": "coordinates of each head",
    "joint": "coordinates that all heads share",
    "pruned": "keys of fewer channels",
    "split": "heads of different kinds",
    "shared": "slots that layers share",
    "tiered": "plain slots in two segments, by their worth",
}
"""What the slots of a cache may be, as far as the order of transforms depends on it."""

PLAIN = ("plain", "by_head")


class Order(NamedTuple):
    """What a transform can work on, and what it makes of it.

    Attributes:
      takes: keys of `SLOTS`, what it can work on beside the whole prompt.
      leaves: what it makes of them; None: what they were. "plain" makes nothing plain that was not.
    """

    takes: tuple[str, ...] = tuple(SLOTS)
    leaves: str | None = None


class Part(NamedTuple):
    """One transform of a chain, as far as the order depends on it."""

    name: str
    order: Order
    acts_later: bool  # after the prompt, too


def in_sequence(parts: Iterable[Part]) -> Order:
    """Returns what transforms can work on and leave when they act one after another.

    Raises:
      ValueError: one of them cannot work on what those before it leave.
    """
    parts = tuple(parts)
    slots, made_by, later = None, "", []
    for part in parts:
        takes, leaves = part.order
        if slots is not None and slots not in takes:
            raise ValueError(f"{part.name} cannot follow {made_by}: it cannot work on {SLOTS[slots]}.")
        if leaves is not None:
            for earlier in later:
                if leaves not in earlier.order.takes:
                    raise ValueError(
                        f"{part.name} cannot follow {earlier.name}, which still acts after the prompt: it cannot work "
                        f"on {SLOTS[leaves]}. Wrap it in at_prefill_end."
                    )
            if slots is None or leaves != "plain":  # heads that differ go on to differ
                slots, made_by = leaves, part.name
        if part.acts_later:
            later.append(part)
    return Order(parts[0].order.takes if parts else tuple(SLOTS), slots)
