"""BatchLLM: which prompts of a batch share which beginnings, and in which order groups are read.

Zheng et al. "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and Throughput-oriented Token
Batching". 2024. arXiv:2412.03594.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class PrefixGroup(NamedTuple):
    """Prompts that share a beginning of `shared` tokens, which is read once for all."""

    rows: tuple[int, ...]  # of the prompts, in their order
    shared: int

    @property
    def saved(self) -> int:
        """Tokens that are not read again."""
        return self.shared * (len(self.rows) - 1)


def prefix_groups(prompts: Sequence[Sequence[int]], *, least: int = 1) -> list[PrefixGroup]:
    """Splits prompts into groups of one shared beginning each, so that the fewest tokens are read.

    The tree of all beginnings is cut where that saves most: a node of depth d over n prompts saves `d (n - 1)` tokens
    as one group, or what its children save as groups of their own. A group's last token is never shared, since every
    prompt reads one of its own for its logits. On a tie the larger group is taken.

    Deviations: the paper flattens the tree by a heuristic of the same aim; this is the optimum, of one level.

    Args:
      prompts: token ids, each at least one.
      least: shorter beginnings are not shared.

    Raises:
      ValueError: a prompt is empty, or least is below 1.
    """
    if least < 1 or not all(map(len, prompts)):
        raise ValueError(f"prompts must have at least 1 token each and least be at least 1, got least={least}.")
    order = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))

    def common(rows: Sequence[int], depth: int) -> int:
        first, last = prompts[rows[0]], prompts[rows[-1]]  # in order, so that all between share what these share
        most = min(len(prompts[row]) for row in rows) - 1
        while depth < most and first[depth] == last[depth]:
            depth += 1
        return depth

    def best(rows: Sequence[int]) -> list[PrefixGroup]:
        """The groups of prompts that are in order."""
        depth = common(rows, 0)
        together = PrefixGroup(tuple(sorted(rows)), depth if depth >= least and len(rows) > 1 else 0)
        if len(rows) == 1:
            return [together]
        parts: dict[object, list[int]] = {}
        for row in rows:
            ends = depth >= len(prompts[row]) - 1
            parts.setdefault(("ends", row) if ends else prompts[row][depth], []).append(row)
        if len(parts) == 1:
            return [together]
        apart = [group for part in parts.values() for group in best(part)]
        if together.saved >= sum(group.saved for group in apart) and together.shared:
            return [together]
        return apart

    groups: list[PrefixGroup] = []
    starts: dict[int, list[int]] = {}
    for row in order:
        starts.setdefault(prompts[row][0], []).append(row)
    for rows in starts.values():
        groups += best(rows)
    return groups


def reading_order(
    groups: Sequence[PrefixGroup], prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]
) -> list[PrefixGroup]:
    """Orders groups by tokens to generate for each token to read, highest first, so that decoding starts early.

    Args:
      groups: of `prefix_groups`.
      prompts: the same.
      new_tokens: expected of each prompt.
    """

    def ratio(group: PrefixGroup) -> float:
        read = sum(len(prompts[row]) for row in group.rows) - group.saved
        return sum(new_tokens[row] for row in group.rows) / read

    return sorted(groups, key=lambda group: (-ratio(group), group.rows))
