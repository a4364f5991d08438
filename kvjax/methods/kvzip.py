"""KVzip: keep what the model needs to repeat its context.

Kim, Kim, Kwon, Lee, Yun, Song. "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction". NeurIPS 2025.
arXiv:2505.23416.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.observation import Instruction, Reread
from kvjax.scores import reconstruction
from kvjax.transforms import CacheTransform, adaptive, at_prefill_end, evict_across_layers


def kvzip(
    budget: Budget = 0.3,
    instruction: Instruction | None = None,
    chunk: int = 2048,
    sinks: int = 4,
    overlap: int = 8,
    page: int = 16,
) -> CacheTransform:
    """Reads the prompt a second time behind its own cache and keeps the slots that were looked at most.

    A slot's score is the largest probability that any query of the second reading, in any head of the group, pays
    it; the highest scores of all layers and heads stay. Each chunk of the prompt is scored by the reading of that
    chunk alone, and p is normalised over the first tokens, the chunk and what is read, as in the official code; for a
    prompt of one chunk this is the softmax of the reading itself.

    Deviations: `sinks` first tokens take the place of the official code's system prompt, which is kept as a whole;
    the count of kept slots is exact where the official threshold drops ties and one slot more.

    Args:
      budget: tokens per KV head on average over the whole cache.
      instruction: token ids that ask the model to repeat what it read; None: the prompt is simply read again.
      chunk: tokens of the prompt that are read again at a time.
      sinks: first tokens, kept in every head.
      overlap: tokens before a chunk that are quoted to say where to go on.
      page: slots of a page.

    Raises:
      ValueError: a chunk of no tokens, or a budget that cannot hold the sinks.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}.")
    if overlap < 0:
        raise ValueError(f"overlap must be at least 0 tokens, got {overlap}.")
    scorer = reconstruction(Reread(chunk, sinks, overlap, instruction or Instruction()))
    return at_prefill_end(evict_across_layers(scorer, budget, heads=adaptive(floor=0.0), sinks=sinks, page=page))
