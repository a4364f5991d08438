"""ChunkKV: keep whole chunks of tokens, the same ones in several layers.

Liu, Tang, Dong, Li, Liu, Li, Hu, Chu. "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context
LLM Inference". NeurIPS 2025. arXiv:2502.00299.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import in_blocks, over_heads, window_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict


def chunkkv(
    budget: Budget = 0.5, chunk: int = 10, window: int = 32, kernel: int = 1, reuse: int = 1
) -> CacheTransform:
    """Keeps the last `window` tokens and the chunks of `chunk` tokens that they attend to most.

    A chunk's score is the mean attention of its tokens over all heads of a layer, so every head keeps the same tokens.
    With `reuse` above 1 the first layer of so many chooses for all of them, by its scores.

    Deviations: the budget is met exactly: of the last chunk that is chosen the oldest tokens stay, as many as there is
    room for. The official code keeps a chunk or drops it. Scores are probabilities; the paper adds up logits.

    Args:
      budget: tokens per KV head, the window included.
      chunk: tokens of a chunk (10 in the paper, 20 in kvpress).
      window: observed queries at the end of the prompt.
      kernel: tokens over which scores are pooled before, odd (1: none, as in the paper; 5 in kvpress).
      reuse: layers in a row that keep the same tokens (the paper's N_reuse, 1 or 2).
    """
    scorer = in_blocks(over_heads(window_attention(window, kernel)), chunk)
    return at_prefill_end(evict(scorer, budget, recent=window, reuse=reuse))
