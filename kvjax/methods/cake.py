"""CAKE: layers that look widely, and at ever other tokens, keep more.

Qin, Cao, Lin, Hu, Fan, Cheng, Lin, Li. "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences". ICLR
2025. arXiv:2503.12491.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import dispersion, window_attention
from kvjax.transforms import CacheTransform, at_prefill_end, evict_across_layers


def cake(
    budget: Budget = 1024,
    window: int = 32,
    kernel: int = 5,
    gamma: float = 200.0,
    tau_entropy: float = 1.0,
    tau_variance: float = 1.0,
    page: int = 16,
) -> CacheTransform:
    """SnapKV's scores with the variance of attention added, and layer budgets by the dispersion of attention.

    Layer l gets a share `H_l ** (1 / tau_entropy) * V_l ** (1 / tau_variance)` of the budget, where H is the entropy
    of the last queries' attention and V its variance over them; the heads of a layer get the same number.

    The cascade shares the budget out among the layers read so far, again after each layer. Its scores stay and its
    budgets fall (where no layer is held to the length of the prompt), so what it keeps in the end is what one split
    over all layers keeps. The paper interleaves it with the prefill, so that no more than the budget and one layer
    exist at a time; here it runs when the prompt is in, and the compiler decides how much of it to interleave.

    Deviations: acts at the end of the prompt only, where the official code goes on to drop tokens while decoding;
    preferences are of each row, not of the sum over a batch.

    Args:
      budget: tokens per KV head on average over the layers, the window included.
      window: observed queries at the end of the prompt, kept in every layer.
      kernel: tokens over which scores are pooled, odd.
      gamma: weight of the variance in a token's score.
      tau_entropy: how little entropy counts for a layer's budget (the paper's tau_1; tuned for each model).
      tau_variance: the same for variance (tau_2).
      page: slots of a page.

    Raises:
      ValueError: a temperature that is not positive, or a budget that cannot hold the window.
    """
    if tau_entropy <= 0 or tau_variance <= 0:
        raise ValueError(f"tau_entropy and tau_variance must be above 0, got {tau_entropy} and {tau_variance}.")
    return at_prefill_end(
        evict_across_layers(
            window_attention(window, kernel, spread=gamma),
            budget,
            layers=dispersion(window, 1 / tau_entropy, 1 / tau_variance),
            recent=window,
            page=page,
        )
    )
