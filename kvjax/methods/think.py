"""ThinK: drop the key channels that the end of the prompt does not use.

Xu, Jie, Dong, Wang, Lu, Zhou, Saha, Xiong, Sahoo. "ThinK: Thinner Key Cache by Query-Driven Pruning". ICLR 2025.
arXiv:2407.21018.
"""

from __future__ import annotations

from kvjax.transforms import CacheTransform, at_prefill_end, prune_channels


def think(prune: float = 0.4, window: int = 32) -> CacheTransform:
    """Drops, per KV head, the `prune` H key channels of lowest `mean q^2 mean k^2`; queries read the rest.

    Deviation: squared queries are averaged over a group, so that a KV head is stored once (the official code
    prunes per query head).

    Args:
      prune: fraction of the key channels.
      window: observed queries at the end of the prompt, and newest tokens that keep all channels, as do all
        tokens that follow.
    """
    return at_prefill_end(prune_channels(prune, queries=window, recent=window))
