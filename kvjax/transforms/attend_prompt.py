"""Makes a prompt attend to itself in chosen blocks; the cache stays as it is."""

from __future__ import annotations

from kvjax.cache import Cache
from kvjax.observation import Needs, Observation
from kvjax.prompt_attention import Choice, PromptAttention
from kvjax.transforms.base import CacheTransform, identity


def attend_prompt(
    choose: Choice, *, block: int = 128, most: float = 1.0, patterns: tuple[tuple[int, ...], ...] | None = None
) -> CacheTransform:
    """Reads a prompt with `PromptAttention` and leaves the cache as it is: for a chain with what compresses it.

    At most one per chain. A mesh must not split the tokens of a prompt. In chunks little is saved: a chunk reads all
    chunks before it as a whole.

    Args:
      choose: which blocks of keys a block of queries reads.
      block: tokens of a block.
      most: fraction of the blocks that may be read, see `PromptAttention`.
      patterns: for every layer, a number of each query head, see `PromptAttention`.

    Raises:
      ValueError: block is below 1, or most is outside (0, 1], or patterns are of fewer layers than the cache has.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}.")
    if not 0 < most <= 1:
        raise ValueError(f"most must be in (0, 1], got {most}.")
    plain = identity()
    needs = Needs(prompt_attention=PromptAttention(choose, block, most, patterns))

    def init(cache: Cache, observation: Observation):
        if patterns is not None and len(patterns) < len(cache.layers):
            raise ValueError(f"patterns must be of all {len(cache.layers)} layers, got {len(patterns)}.")
        return cache, ()

    return plain._replace(init=init, schedule=plain.schedule._replace(needs=needs, name="attend_prompt"))
