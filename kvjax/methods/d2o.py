"""D2O: evicted tokens that resemble a kept one are merged into it; layers with concentrated attention keep less.

Wan, Wu, Zhang, Xin, Tao, Zhu, Wang, Luo, Xiong, Wang, Zhang. "D2O: Dynamic Discriminative Operations for Efficient
Long-Context Inference of Large Language Models". ICLR 2025. arXiv:2406.13035.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention
from kvjax.transforms import CacheTransform, by_variance, every_step, into_nearest, merge, whole_layers


def d2o(
    budget: Budget = 0.2,
    recent: Budget = 0.5,
    sinks: int = 4,
    smoothing: float = 0.5,
    calibration: Mapping[str, jax.Array] | None = None,
    whole: Sequence[int] = (0, 1, -1),
    log_count: bool = False,
) -> CacheTransform:
    """H2O whose evicted tokens go to the kept token of most similar key; acts at every step.

    Deviations: the variance that splits the budget over layers is that of calibration texts, not of each prompt, as
    sizes must be known before anything runs. Whole layers hold as many tokens as the prompt had, so that memory is
    bounded; the official code lets them grow. Each head decides by itself what to merge; the official code averages
    over heads the similarities of tokens that are not the same. Merged tokens are the weighted means of the paper,
    not the means of `S k` of its code, which shrink keys. Scores are averaged over a query group. After a chunked
    prefill the threshold starts anew.

    Args:
      budget: tokens per KV head (the paper's default: 0.1 heavy and 0.1 recent), whole layers aside.
      recent: share of the budget (float) or tokens (int) given to the newest.
      sinks: first tokens that are always kept.
      smoothing: of the threshold below which evicted tokens are dropped.
      calibration: of `experiments.calibrate --method=d2o`: `variance` f32[L]. None: the same budget for all layers.
      whole: layers that are not compressed, on top of the budget.
      log_count: weigh a merged token by how many it stands for; not in the paper.
    """
    layers = None if calibration is None else by_variance(np.asarray(calibration["variance"]))
    if whole:
        layers = whole_layers(whole, layers)
    rule = into_nearest(smoothing)
    scorer = accumulated_attention()
    return every_step(
        merge(scorer, budget, rule, sinks=sinks, recent=recent, layers=layers, log_count=log_count)
    )
