"""EMS: dropped tokens go to a kept one of similar key and value, weighted by attention, or nowhere.

Li, Li, Meng, Ma, Geng, Xia, Wang. "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on
Global-Local Importance". 2024. arXiv:2412.08521.
"""

from __future__ import annotations

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention, end_attention, strongest
from kvjax.transforms import CacheTransform, at_prefill_end, into_similar, merge


def ems(
    budget: Budget = 256, window: int = 32, least: float = 0.6, sinks: int = 0, log_count: bool = False
) -> CacheTransform:
    """Keeps, per KV head, the last `window` tokens and those that matter to all queries of the prompt or to its end.

    A score is the larger of the attention over all queries, per query that could see the token, and that of the last
    `window`, each over its mean. A dropped token goes to the kept one whose key and value are most similar, by the
    product of their cosines, and counts there by its score over that one's; below `least` it is forgotten.

    Deviations: there is no official code, and the paper's formulas are unverified; `least` is ours. Keys are averaged
    as they are stored, rotated and with their norms, which the paper keeps apart. Heads share no entries. It acts when
    the prompt is in.

    Bytes: 12 a slot beside those of the kept tokens, for the attention that is added up while the prompt arrives.

    Args:
      budget: tokens per KV head, the window included.
      window: newest tokens of the prompt, always kept, and the queries of the local score.
      least: similarity below which a token is forgotten.
      sinks: first tokens, always kept.
      log_count: weigh a merged token by how many it stands for; not in the paper.
    """
    scorer = strongest(accumulated_attention(normalise=True), end_attention(window))
    rule = into_similar("attention", by_values=True, least=least)
    return at_prefill_end(merge(scorer, budget, rule, sinks=sinks, recent=window, log_count=log_count))
