"""ZipVL: a prompt reads its important tokens alone, and these are stored with more bits.

He, Chen, Liu, Shao, Zhou, Zhang, Zhuang. "ZipVL: Efficient Large Vision-Language Models with Dynamic Token
Sparsification". 2024. arXiv:2410.08584.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.line_choices import Important
from kvjax.probes import probe_salience
from kvjax.transforms import (
    CacheTransform,
    at_prefill_end,
    attend_prompt,
    chain,
    quantize,
    separate_values,
    split_slots,
)


def zipvl(
    tau: float = 0.975,
    budget: Budget = 0.6,
    probes: int = 128,
    salient_bits: int = 4,
    bits: int = 2,
    group: int = 32,
    residual: int = 32,
    block: int = 128,
) -> CacheTransform:
    """Lets a prompt read, in each layer, the fewest tokens that hold `tau` of the attention of its last queries.

    One saliency says which: the attention that a token received from the probes, divided by those that could see it.
    By the same the cache stores `budget` tokens with `salient_bits` and all others with `bits`, as `zipcache` does.

    Bytes per token and KV head: see `zipcache`.

    Deviations: text alone. Probes are the last queries, none are random. Tokens that are not important read the
    important ones and the block that they are in, where the paper's attend to nothing: every query sees itself, and
    its lse is of use to what looks at it. How many tokens are stored with more bits is a budget, since shapes are
    static; the paper stores as many as it reads. Tokens generated later have more bits until the end, the paper scores
    them anew every 100 tokens. Of a prompt in chunks, a chunk reads everything before it.

    Args:
      tau: share of the attention, in (0, 1]; 1.0: every token is read.
      budget: tokens per KV head that have more bits, as a count or as a fraction of the prompt.
      probes: queries at the end of the prompt.
      salient_bits: 2, 3, 4 or 8.
      bits: of all other tokens.
      group: tokens of a key channel that share a scale.
      residual: tokens of a block of salient ones; the newest `number mod residual` stay exact.
      block: tokens that are read together.

    Raises:
      ValueError: tau is outside (0, 1], or probes or block is below 1.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau must be in (0, 1], got {tau}.")
    packed = quantize(salient_bits, written_bits=bits, key_group=group, value_group=None, residual=residual)
    stored = at_prefill_end(chain(split_slots(probe_salience(probes), budget), separate_values(), packed))
    return chain(attend_prompt(Important(tau, probes), block=block), stored)
