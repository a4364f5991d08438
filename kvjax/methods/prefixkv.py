"""PrefixKV: every layer keeps as many tokens as it needs for the same share of its attention.

Wang, Chen, Li, Tan, Zhang, Cai, Lin, Han, Ding. "PrefixKV: Adaptive Prefix KV Cache is What Vision
Instruction-Following Models Need for Efficient Generation". NeurIPS 2025. arXiv:2412.03409.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention, over_heads
from kvjax.transforms import CacheTransform, at_prefill_end, by_coverage, evict


def prefixkv(
    calibration: Mapping[str, jax.Array], budget: Budget = 0.5, sinks: int = 1, recent: int = 1
) -> CacheTransform:
    """Keeps, per layer, the tokens with most attention over the prompt, the same ones in every head.

    How many is decided before: such that every layer holds the same share of the attention, on texts.

    Deviations: the curves of calibration texts are averaged, not the budgets they lead to; one calibration serves all
    budgets. Texts take the place of images with questions. It acts when the prompt is in; the official code goes on to
    drop one token near the end of the cache whenever it has grown beyond its ratio.

    Bytes: 4 a slot beside those of the kept tokens, for the attention that is added up while the prompt arrives.

    Args:
      calibration: of `experiments.calibrate --method=prefixkv`: `coverage` f32[L, n].
      budget: tokens per KV head on average over the layers; the paper's ratio is what is removed.
      sinks: first tokens, always kept.
      recent: newest tokens, always kept.
    """
    scorer = over_heads(accumulated_attention())
    layers = by_coverage(np.asarray(calibration["coverage"]))
    return at_prefill_end(evict(scorer, budget, sinks=sinks, recent=recent, layers=layers))
