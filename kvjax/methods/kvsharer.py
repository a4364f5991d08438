"""KVSharer: deep layers read the keys and values of shallower layers that differ most from their own.

Yang, Cao, Chen, Qin, Zhao, Zhang, Chen. "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing".
2024. arXiv:2410.18517.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from kvjax.transforms import CacheTransform, at_prefill_end, share_layers


def kvsharer(calibration: Mapping[str, jax.Array], shared: int | float = 0.25) -> CacheTransform:
    """Drops the prompt of `shared` layers; each reads that of a shallower layer.

    Pairs of layers are tried from the largest Euclidean distance of their mean keys and values on, and kept where the
    model's last hidden states stay similar.

    Bytes: those of a full cache of the other layers, and of the tokens that follow the prompt in all of them.

    Deviations: layers share the prompt, after it was read without sharing; the tokens that follow are each layer's
    own, and no layer's projections of keys and values are skipped. Distances are of all tokens of a text, not of
    texts of up to 64.

    Args:
      calibration: of `experiments.calibrate --method=kvsharer`: `giver` f32[L], the layer that each may read (itself:
        none), and `turn` f32[L], in which order they were found.
      shared: layers that read another one: a count, or a fraction of all, rounded down.

    Raises:
      ValueError: fewer layers were found, or a fraction outside [0, 1].
    """
    giver, turn = (np.asarray(calibration[name], np.int64) for name in ("giver", "turn"))
    count = int(shared * len(giver) + 1e-9) if isinstance(shared, float) else shared
    found = int(np.sum(giver != np.arange(len(giver))))
    if not 0 <= count <= found:
        raise ValueError(f"shared must be from 0 to the {found} layers that were found, got {shared}.")
    reads = (giver != np.arange(len(giver))) & (turn < count)
    return at_prefill_end(share_layers(np.where(reads, giver, np.arange(len(giver)))))
