"""Makes a prompt attend to itself in chosen blocks; the cache stays as it is."""

from __future__ import annotations

from kvjax.observation import Needs
from kvjax.prompt_attention import Choice, PromptAttention
from kvjax.transforms.base import CacheTransform, identity


def attend_prompt(choose: Choice, *, block: int = 128, most: float = 1.0) -> CacheTransform:
    """Reads a prompt with `PromptAttention` and leaves the cache as it is: for a chain with what compresses it.

    At most one per chain. A mesh must not split the tokens of a prompt. In chunks little is saved: a chunk reads all
    chunks before it as a whole.

    Args:
      choose: which blocks of keys a block of queries reads.
      block: tokens of a block.
      most: fraction of the blocks that may be read, see `PromptAttention`.

    Raises:
      ValueError: block is below 1, or most is outside (0, 1].
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}.")
    if not 0 < most <= 1:
        raise ValueError(f"most must be in (0, 1], got {most}.")
    plain = identity()
    needs = Needs(prompt_attention=PromptAttention(choose, block, most))
    return plain._replace(schedule=plain.schedule._replace(needs=needs, name="attend_prompt"))
