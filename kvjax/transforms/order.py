"""Which transforms may follow which: what each asks of the slots it finds, and what it takes from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

PROPERTIES = {
    "whole": "the whole prompt, the same tokens in every layer",
    "aligned": "the same tokens in every head",
    "slots": "slots that are kept and dropped one by one",
    "room": "slots that new tokens do not overwrite",
    "vectors": "keys and values as vectors of one head",
    "channels": "all channels of keys and values",
    "numbers": "stored numbers that are no codes yet",
    "rotated": "keys that are rotated where they are stored",
    "places": "keys that are rotated at their tokens' positions, not at ranks in the cache",
    "heads": "slots that lie head by head, not in pages",
    "own": "slots that no other layer shares",
    "tiers": "slots in two segments, by their worth",
}
"""What slots may have, with how errors call it. A cache begins with all but "tiers"."""

BEGINNING = frozenset(PROPERTIES) - {"tiers"}


class Order(NamedTuple):
    """What a transform needs of slots, and how it leaves them.

    Attributes:
      needs: keys of `PROPERTIES` that slots must have; what codecs and layouts can do decides them.
      loses: those that they no longer have afterwards.
      gives: those that they have from then on.
    """

    needs: frozenset[str] = frozenset()
    loses: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()

    @classmethod
    def of(cls, needs: str = "", loses: str = "", gives: str = "") -> Order:
        """Reads names that are separated by spaces."""
        return cls(*(frozenset(names.split()) for names in (needs, loses, gives)))


class Part(NamedTuple):
    """One transform of a chain, as far as the order depends on it."""

    name: str
    order: Order
    acts_later: bool  # after the prompt, too


def in_sequence(parts: Iterable[Part]) -> Order:
    """Returns what transforms need and leave when they act one after another.

    Raises:
      ValueError: one of them needs what another one has taken.
    """
    has, needs, gives = set(BEGINNING), set(), set()
    lost_by: dict[str, str] = {}
    later: list[Part] = []
    for part in parts:
        for name in sorted(part.order.needs - has):
            if name in lost_by:
                raise ValueError(f"{part.name} cannot follow {lost_by[name]}: it needs {PROPERTIES[name]}.")
            raise ValueError(f"{part.name} needs {PROPERTIES[name]}, which nothing before it makes.")
        for earlier in later:
            for name in sorted(part.order.loses & earlier.order.needs):
                raise ValueError(
                    f"{part.name} cannot follow {earlier.name}, which still acts while tokens come: it needs "
                    f"{PROPERTIES[name]}. Wrap it in at_prefill_end."
                )
        needs |= part.order.needs - gives
        lost_by |= {name: part.name for name in part.order.loses & has}
        has = (has - part.order.loses) | part.order.gives
        gives |= part.order.gives
        if part.acts_later:
            later.append(part)
    return Order(frozenset(needs), frozenset(lost_by) - has, frozenset(gives & has))
