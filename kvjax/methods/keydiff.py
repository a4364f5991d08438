"""KeyDiff: keep keys that differ from the average key.

Park, Jones, Morse, Goel, Lee, Lott. "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
Inference in Resource-Constrained Environments". 2025. arXiv:2504.15364.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import key_difference
from kvjax.transforms import CacheTransform, at_prefill_end, every_chunk, evict


def keydiff(budget: Budget = 0.5, by_chunk: bool = False) -> CacheTransform:
    """Keeps, per KV head, the tokens whose keys have the smallest cosine with the mean of the unit keys.

    Deviations: by default it acts once, when the prompt is in, as in kvpress. With `by_chunk` it acts after every chunk
    of the prompt, as in the paper, whose cache never holds more than the budget and one block: the mean is of what the
    cache holds then. Either way decoding appends and drops nothing.

    Args:
      budget: tokens per KV head.
      by_chunk: acts after every chunk of the prompt; its size is that of the prefill (128 in the paper).
    """
    when = every_chunk if by_chunk else at_prefill_end
    return when(evict(key_difference(), budget))
