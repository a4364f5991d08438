"""LoCoCo: what a cache of fixed size has no room for is mixed into a few slots by a trained convolution.

Cai, Tian, Wang, Chen. "LoCoCo: Dropping In Convolutions for Long Context Compression". ICML 2024. arXiv:2406.05317.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.budget import Budget
from kvjax.scores import call_attention
from kvjax.transforms import CacheTransform, convolve, every_chunk, learned


def lococo(
    calibration: Mapping[str, jax.Array],
    budget: Budget = 512,
    sinks: int = 0,
    recent: Budget = 0.25,
) -> CacheTransform:
    """After every chunk of the prompt, keeps the tokens that the chunk attended to most and mixes the others.

    Of a budget of M slots M - C hold heavy hitters. All other tokens, those mixed earlier among them, become C slots,
    by a convolution over their un-rotated keys and values that the heads of a layer share. Decoding appends and drops
    nothing.

    Deviations: scores are averaged over a query group. It acts when the budget is exceeded, not 16 tokens later. The
    official code protects no tokens; here the newest stay as they are, for the first queries of what follows. Keys are
    mixed before their rotation. The decoder is not tuned, and nothing rescales positions.

    Args:
      calibration: of `experiments.train --gin_file=configs/runs/train_lococo.gin`: `kernel` f32[L, width, 2 H, C],
        `bias` f32[L, C] and `mix` f32[L]; held beside the model's weights, not in the cache.
      budget: M, tokens per KV head, as a count or as a fraction of the prompt; C, half of it in the paper, is the
        calibration's.
      sinks: first tokens that stay as they are.
      recent: newest tokens that do: a count, or a fraction of the budget.

    Raises:
      ValueError: the budget cannot hold the C slots, the sinks and the recent tokens.
    """
    merge = convolve(call_attention(), budget, calibration["kernel"].shape[-1], sinks=sinks, recent=recent)
    names = ("kernel", "bias", "mix")
    parts = [dict(zip(names, arrays)) for arrays in zip(*(calibration[name] for name in names))]
    return every_chunk(learned(merge, parts))
