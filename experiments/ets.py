"""ETS: which branches of a search tree go on, weighing what they are worth against the cache that they need.

Hooper et al. "ETS: Efficient Tree Search for Inference-Time Scaling". 2025. arXiv:2502.13575.

The branches that stay share their trunk in the cache by `kvjax.before` and fork by `kvjax.reuse.taken_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import LinearConstraint, milp


def rebase_counts(rewards: Sequence[float], width: int, temperature: float = 0.2) -> np.ndarray:
    """Returns i64[N], continuations of each leaf: `ceil(width softmax(reward / temperature))` while any are left."""
    scaled = np.asarray(rewards, np.float64) / temperature
    share = np.exp(scaled - scaled.max())
    share /= share.sum()
    counts, left = np.zeros(len(share), np.int64), width
    for leaf in np.argsort(-share, kind="stable"):
        counts[leaf] = min(left, math.ceil(width * share[leaf] - 1e-9))
        left -= counts[leaf]
    return counts


def clusters(embeddings: np.ndarray, cut: float = 0.05) -> np.ndarray:
    """Returns i64[N], a cluster of each leaf's last step: average linkage of cosine distances f64[N, D] below `cut`."""
    if len(embeddings) < 2:
        return np.zeros(len(embeddings), np.int64)
    return fcluster(linkage(embeddings, "average", metric="cosine"), cut, "distance").astype(np.int64) - 1


def kept_leaves(
    paths: Sequence[Sequence[int]],
    worth: Sequence[float],
    cluster: Sequence[int],
    *,
    budget_weight: float = 1.0,
    diversity_weight: float = 1.5,
) -> np.ndarray:
    """Chooses leaves by an integer linear program: bool[N].

    Maximises `sum_i O_i x_i - budget_weight (sum_j y_j + sum_i x_i) / (M + N) + diversity_weight / K sum_k c_k` over
    leaves x, the M inner nodes y that kept leaves pass and the K clusters c that they cover; at least one leaf stays.

    Deviations: none known. Every node counts as one, as in the paper, whatever its number of tokens.

    Args:
      paths: of every leaf, the inner nodes that it passes.
      worth: O, counts of `rebase_counts`; they are divided by their sum.
      cluster: of every leaf.
      budget_weight: what cache costs.
      diversity_weight: what a covered cluster gives; the paper has 1.5, 1.4 and 1.45 for widths of 16, 64 and 256.

    Raises:
      ValueError: there is no leaf, or the arguments are not of as many.
    """
    N = len(paths)
    if not N or len(worth) != N or len(cluster) != N:
        raise ValueError(f"paths, worth and cluster must be of the same leaves, got {N}, {len(worth)}, {len(cluster)}.")
    inner = {node: index for index, node in enumerate(sorted({node for path in paths for node in path}))}
    kinds = {kind: index for index, kind in enumerate(sorted(set(cluster)))}
    M, K = len(inner), len(kinds)
    share = np.asarray(worth, np.float64) / max(float(np.sum(worth)), 1e-12)
    cost = budget_weight / (M + N)
    gain = np.concatenate([share - cost, np.full(M, -cost), np.full(K, diversity_weight / K)])
    rules, least = [np.concatenate([np.ones(N), np.zeros(M + K)])], [1.0]
    for leaf, path in enumerate(paths):
        for node in path:  # y_j >= x_i
            rule = np.zeros(N + M + K)
            rule[N + inner[node]], rule[leaf] = 1, -1
            rules.append(rule)
            least.append(0.0)
    for kind, index in kinds.items():  # c_k <= sum of its leaves
        rule = np.concatenate([np.equal(cluster, kind).astype(np.float64), np.zeros(M + K)])
        rule[N + M + index] = -1
        rules.append(rule)
        least.append(0.0)
    size = len(gain)
    found = milp(
        -gain, integrality=np.ones(size), bounds=(0, 1), constraints=LinearConstraint(np.stack(rules), least, np.inf)
    )
    return found.x[:N] > 0.5
