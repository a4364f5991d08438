"""Attention-Gate: a small attention in every layer looks at the whole prompt and says which tokens to cache.

Zeng, Lin, Hou, Zhang, Deng. "In-context KV-Cache Eviction for LLMs via Attention-Gate". 2024. arXiv:2410.12876.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.budget import Budget
from kvjax.gating import attention_gate as gate_scores
from kvjax.transforms import CacheTransform, adaptive, at_prefill_end, evict_by_head, learned


def attention_gate(
    calibration: Mapping[str, jax.Array],
    budget: Budget = 0.5,
    sinks: int = 4,
    recent: Budget = 32,
    page: int = 16,
) -> CacheTransform:
    """Keeps, when the prompt is in, the tokens that the gates of their heads rate highest; heads keep what they need.

    A token stays in a head where its gate is open, `p > tau`. tau is what leaves the budget of a
    layer to its heads, so that bytes are known before the prompt is; each head keeps another number of tokens.

    Deviations: there is no official code, and the width, the start and tau of the gates are not published. The gate
    reads the token's un-rotated keys and values, linear maps of the layer's input, because the cache holds them
    however the prompt came; a token adds its own value to what it attends to. One tau for all prompts would make
    bytes depend on the prompt. The first and the newest tokens pass in any case. The prompt attends to itself whole.

    Args:
      calibration: of `experiments.train --gin_file=configs/runs/train_attention_gate.gin`: `qkv` f32[L, 2, K, H, 3,
        A, C], `out` f32[L, A, C, K] and `bias` f32[L, K]; held beside the model's weights, not in the cache.
      budget: tokens per KV head on average over a layer, as a count or as a fraction of the prompt.
      sinks: first tokens, kept in every head.
      recent: newest tokens, kept in every head: a count, or a fraction of the budget.
      page: slots of a page.

    Raises:
      ValueError: the budget cannot hold the sinks and the recent tokens.
    """
    keep = evict_by_head(gate_scores(), budget, heads=adaptive(floor=0.0), sinks=sinks, recent=recent, page=page)
    names = ("qkv", "out", "bias")
    parts = [dict(zip(names, arrays)) for arrays in zip(*(calibration[name] for name in names))]
    gated = at_prefill_end(learned(keep, parts))
    order = gated.schedule.order
    order = order._replace(needs=order.needs | {"aligned"})  # the gate reads a token in all heads
    return gated._replace(schedule=gated.schedule._replace(order=order))
