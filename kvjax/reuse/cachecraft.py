"""Cache-Craft: how many tokens of a chunk, and which, must be read again where other chunks come before it.

Agarwal et al. "Cache-Craft: Managing Chunk-Caches for Efficient Retrieval-Augmented Generation". 2025.
arXiv:2502.15734.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import LayerCache
from kvjax.observation import LayerObservation


class ChunkScores(NamedTuple):
    """What is stored beside a chunk's cache: how much it looked at what came before it."""

    before: tuple[Hashable, ...]  # the chunks that came before it when it was read
    inter: np.ndarray  # f64[n], attention to each of them, summed over pairs of tokens and averaged over layers
    impact: float  # CCI = sigmoid(a / b): 0.5 for a chunk that looked at itself alone
    tokens: np.ndarray  # f64[|i|], attention of each token to all of them, averaged over layers


def head_mean_attention(layer: LayerCache, seen: LayerObservation) -> jax.Array:
    """Computes f32[B, T, T], the probability of every query for every token, averaged over heads.

    Args:
      layer: with rotated keys of T tokens in one dense segment.
      seen: of all queries (`Needs(queries=ALL)`).
    """
    segment = layer.segments[-1].in_token_order()
    q = seen.queries.rotated.astype(jnp.float32)
    B, T, N, H = q.shape
    k = segment.k[:, :, :T].astype(jnp.float32)
    grouped = q.reshape(B, T, k.shape[1], -1, H)
    scale = H**-0.5 if seen.scale is None else seen.scale
    logits = scale * jnp.einsum("btkgh,bksh->btkgs", grouped, k, precision=jax.lax.Precision.HIGHEST)
    lse = seen.lse.reshape(B, T, k.shape[1], -1, 1)
    visible = seen.queries.pos[:, :, None] >= jnp.arange(T)
    p = jnp.where(visible[:, :, None, None], jnp.exp(logits - lse), 0.0)
    return jnp.mean(p, axis=(2, 3))


def chunk_scores(attention: np.ndarray, names: Sequence[Hashable], lengths: Sequence[int]) -> list[ChunkScores]:
    """Scores every chunk of a text that was read at once.

    With `inter(i, j)` and `intra(i)` the attention of chunk i to chunk j and to itself, a is the mean over layers of
    `sum_j inter(i, j) / (|i| |j|)` and b that of `intra(i) / |i|^2`.

    Args:
      attention: f32[L, T, T], `head_mean_attention` of every layer of one row.
      names: of the chunks, in order.
      lengths: of the chunks, T tokens together.

    Raises:
      ValueError: lengths are not of these names, or do not add up.
    """
    attention = np.asarray(attention, np.float64)
    if len(names) != len(lengths) or sum(lengths) != attention.shape[-1]:
        raise ValueError(
            f"lengths must be of the {len(names)} names and {attention.shape[-1]} together, got {list(lengths)}."
        )
    ends = list(itertools.accumulate(lengths))
    parts = [slice(end - length, end) for end, length in zip(ends, lengths)]
    scores = []
    for i, own in enumerate(parts):
        inter = np.array([attention[:, own, other].sum(axis=(1, 2)).mean() for other in parts[:i]])
        a = sum(x / (lengths[i] * lengths[j]) for j, x in enumerate(inter))
        b = attention[:, own, own].sum(axis=(1, 2)).mean() / lengths[i] ** 2
        tokens = attention[:, own, : own.start].sum(axis=2).mean(axis=0)
        scores.append(ChunkScores(tuple(names[:i]), inter, 1 / (1 + math.exp(-a / b)), tokens))
    return scores


def recomputed_fraction(scores: ChunkScores, before: Sequence[Hashable], *, alpha: float = 1.0) -> float:
    """Computes CFO, the part of a chunk to read again behind other chunks: `alpha CCI (1 - beta')`, within 0 to 1.

    `beta' = beta (1 - gamma)`: beta is the part of its attention that went to chunks that are there again, gamma the
    part of their pairs that are in another order (Kendall's tau). A chunk that was read first needs nothing.

    Deviations: alpha is tuned for a target of quality in the paper; 1 is what re-implementations take.

    Args:
      scores: stored with the chunk.
      before: the chunks that come before it now.
      alpha: factor.
    """
    if not scores.before:
        return 0.0
    total = float(scores.inter.sum())
    common = [name for name in scores.before if name in set(before)]
    kept = sum(x for name, x in zip(scores.before, scores.inter) if name in common)
    beta = kept / total if total else 1.0
    place = {name: index for index, name in enumerate(before)}
    pairs = list(itertools.combinations(common, 2))
    gamma = sum(place[a] > place[b] for a, b in pairs) / len(pairs) if pairs else 0.0
    return min(max(alpha * scores.impact * (1 - beta * (1 - gamma)), 0.0), 1.0)


def recomputed_tokens(scores: ChunkScores, before: Sequence[Hashable], *, alpha: float = 1.0) -> np.ndarray:
    """Returns the tokens of a chunk to read again, in order: `ceil(CFO |i|)` that looked most at what was before it.

    Of a tie the earlier token. Where they come to lie they are read again by `rewritten`.
    """
    count = math.ceil(recomputed_fraction(scores, before, alpha=alpha) * len(scores.tokens) - 1e-9)
    return np.sort(np.argsort(-np.float32(scores.tokens).round(5), kind="stable")[:count])
