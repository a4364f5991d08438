"""RazorAttention: retrieval heads keep everything, the others a window and one compensation token.

Tang, Lin, Lin, Han, Hong, Yao, Wang. "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads".
ICLR 2025. arXiv:2407.15891.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np

from kvjax.transforms import CacheTransform, at_prefill_end, split_heads


def razorattention(
    calibration: Mapping[str, jax.Array],
    induction: float = 0.14,
    echo: float = 0.01,
    sinks: int = 4,
    recent: int = 4000,
    fraction: float = 0.2,
) -> CacheTransform:
    """Keeps all tokens of the strongest induction and echo heads; of the others, sinks, the newest and a mean.

    A head that is no retrieval head holds the first `sinks` tokens, the newest `max(recent, fraction * prompt)`, and
    the mean key and value of the N tokens between, which weighs N times in the softmax.

    Deviations: the paper says nothing of decoding; here a token that leaves the window joins the mean. Heads are KV
    heads, scored by the highest of their query group, and fractions of them are rounded up. The window of ALiBi
    models is not implemented.

    Args:
      calibration: of `experiments.calibrate --method=razorattention`: `induction` and `echo`, f32[L, K].
      induction: fraction of the KV heads that are retrieval heads by their induction score.
      echo: the same by their echo score.
      sinks: first tokens that every head keeps.
      recent: newest tokens that every head keeps at least.
      fraction: the same as a fraction of the prompt.

    Raises:
      ValueError: a fraction of heads is outside [0, 1], or sinks, recent or fraction make no sense.
    """
    scores = np.asarray(calibration["induction"])
    full = np.zeros(scores.size, bool)
    for name, share in (("induction", induction), ("echo", echo)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a fraction of the heads in [0, 1], got {share}.")
        strongest = np.argsort(-np.asarray(calibration[name]), axis=None, kind="stable")
        full[strongest[: math.ceil(share * scores.size)]] = True
    heads = [np.flatnonzero(layer) for layer in full.reshape(scores.shape)]
    return at_prefill_end(split_heads(heads, sinks=sinks, recent=recent, fraction=fraction, compensate=True))
