"""Keyformer: heavy hitters of an attention with noise and a rising temperature.

Adnan, Arunkumar, Jain, Nair, Soloveychik, Kamath. "Keyformer: KV Cache Reduction through Key Tokens Selection for
Efficient Generative Inference". MLSys 2024. arXiv:2403.09054.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import gumbel_attention
from kvjax.transforms import CacheTransform, every_step, evict


def keyformer(
    budget: Budget = 0.6,
    recent: Budget = 0.3,
    temperature: float = 1.0,
    growth: float = 0.01,
    noise: float = 1.0,
    seed: int = 0,
) -> CacheTransform:
    """Keeps the newest tokens and those with most perturbed attention so far; acts at every step.

    See `kvjax.scores.gumbel_attention`. With `noise=0`, `temperature=1` and `growth=0` it is H2O.

    Deviations: scores are averaged over the query heads of a group; the official code knows no groups. Positions are
    the original ones, as in the code; the paper also tries new ones. When several tokens arrive in one call they are
    all seen before any is evicted. The code masks what it evicts; here its memory is used again.

    Args:
      budget: tokens per KV head, as a count or as a fraction of the prompt (60% in the code's examples).
      recent: share of the budget (float) or tokens (int) given to the newest.
      temperature: of the prompt (tau_init).
      growth: of the temperature with every generated token (tau_delta; the paper goes linearly from 1 to 2 over the
        generation, the code adds 0.01 a token).
      noise: factor of the Gumbel noise; 0 draws none.
      seed: of the noise.
    """
    return every_step(evict(gumbel_attention(temperature, growth, noise, seed), budget, recent=recent))
