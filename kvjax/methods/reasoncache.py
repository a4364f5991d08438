"""ReasonCACHE: what many demonstrations teach, as a few trained slots before every prompt.

Gupta et al. "ReasonCACHE: Teaching LLMs To Reason Without Weight Updates". 2026. arXiv:2602.02366.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kvjax.transforms import CacheTransform, prefix


def reasoncache(calibration: Mapping[str, jax.Array]) -> CacheTransform:
    """Puts a trained prefix of m slots a KV head before the prompt, in place of the tokens that would say the same.

    The prompt and all that follows attend to it; what it costs is `m` slots of every KV head, once for all rows of a
    batch, however much it was trained on. It composes with what compresses the prompt.

    Deviations: the paper does not say where a prefix lies; it is taken for rotated keys that every token sees, and
    tokens keep their positions, in training as here.

    Args:
      calibration: of `experiments.train --gin_file=configs/runs/train_prefix.gin`: `key`, `value` f32[L, K, m, H].

    Raises:
      ValueError: the prefix is of another model (when it runs).
    """
    return prefix(list(zip(calibration["key"], calibration["value"])))
