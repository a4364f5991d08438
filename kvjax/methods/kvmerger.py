"""KVMerger: runs of neighbouring tokens with similar keys become one token each.

Wang, Jin, Liu, Yuan, Wang. "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context
Tasks". 2024. arXiv:2407.08454.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.budget import Budget
from kvjax.scores import accumulated_attention
from kvjax.transforms import CacheTransform, every_chunk, into_runs, merge, whole_layers


def kvmerger(
    budget: Budget = 0.5,
    recent: Budget = 0.34,
    heavy: float = 0.24,
    threshold: float = 0.75,
    width: float = 5.0,
    whole: Sequence[int] = (0, 1, -1),
    log_count: bool = False,
) -> CacheTransform:
    """Merges runs into their most attended token, weighted by a Gaussian kernel; acts when the prompt is in.

    Deviations: there is no official code. A budget decides how many links between neighbours hold, the most similar
    first; where the threshold leaves too few, the least attended tokens are dropped. The paper takes every link and
    tunes its shares until the size is right. The kernel has one width for all runs. Keys are merged rotated, at the
    pivot's position. Values are weighted as keys are. Scores are averaged over a query group. A prompt that comes in
    chunks is merged after each of them.

    Args:
      budget: tokens per KV head, whole layers aside.
      recent: share of the budget (float; the paper's 17% of the prompt at a budget of one half) or tokens (int)
        given to the newest, which are not merged.
      heavy: share of the budget given to the most attended, which are not merged (the paper's 12% of the prompt).
      threshold: cosine of neighbouring keys above which they may be merged.
      width: of the Gaussian kernel, in the unit of keys.
      whole: layers that are not compressed, on top of the budget.
      log_count: weigh a merged token by how many it stands for; not in the paper.
    """
    rule = into_runs(threshold, width, heavy)
    layers = whole_layers(whole) if whole else None
    scorer = accumulated_attention()
    return every_chunk(merge(scorer, budget, rule, recent=recent, layers=layers, log_count=log_count))
