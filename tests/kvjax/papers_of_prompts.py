"""What papers of sparse prompts let each token read, transcribed in NumPy: bool[N, T, T] of one row without padding.

Queries are f64[T, N, H] and keys f64[N, T, H], rotated, a key for every query head. A block is read whole.
"""

from __future__ import annotations

import numpy as np


def _causal(T: int) -> np.ndarray:
    return np.tril(np.ones((T, T), bool))


def _probabilities(q: np.ndarray, k: np.ndarray, probes: int) -> np.ndarray:
    """f64[N, W, T] of the last queries."""
    T, _, H = q.shape
    logits = np.einsum("wnh,nsh->nws", q[-probes:], k) / np.sqrt(H)
    seen = _causal(T)[-probes:]
    p = np.where(seen, np.exp(logits - logits.max()), 0.0)
    return p / p.sum(-1, keepdims=True)


def _in_blocks(pairs: np.ndarray, block: int) -> np.ndarray:
    """Every block of which a pair is chosen, and those of the diagonal; causal."""
    T = len(pairs)
    wide = np.zeros((T, T), bool)
    for i in range(0, T, block):
        for j in range(0, i + 1, block):
            wide[i : i + block, j : j + block] = i == j or pairs[i : i + block, j : j + block].any()
    return wide & _causal(T)


def _touched(distances: np.ndarray, T: int, block: int) -> np.ndarray:
    """The pairs of whole blocks at some distances: a last block that is cut short counts as whole."""
    whole = -(-T // block) * block
    apart = np.arange(whole)[:, None] - np.arange(whole)
    return _in_blocks(np.isin(apart, distances), block)[:T, :T]


def a_shape(T: int, heads: int, first: int, near: int, block: int) -> np.ndarray:
    """MInference, A-shape: the first tokens, and the nearest in whole blocks."""
    seen = _touched(np.arange(near), T, block) | (np.arange(T) < first)
    return np.broadcast_to(seen & _causal(T), (heads, T, T))


def vertical_slash(
    q: np.ndarray, k: np.ndarray, columns: int, diagonals: int, probes: int, always: int, block: int
) -> np.ndarray:
    """MInference, algorithm 2, and `vertical_and_slash_kernel`: sums of the last queries by column and by diagonal."""
    T, N, _ = q.shape
    p = _probabilities(q, k, probes)
    W = p.shape[1]
    seen = np.zeros((N, T, T), bool)
    for n in range(N):
        vertical, slash = p[n].sum(axis=0), np.zeros(T)
        for w in range(W):
            for s in range(T - W + w + 1):
                slash[T - W + w - s] += p[n, w, s]
        vertical[:always], slash[:always] = np.inf, np.inf
        chosen = np.argsort(-vertical, kind="stable")[:columns]
        distances = np.argsort(-slash, kind="stable")[:diagonals]
        seen[n] = (_touched(distances, T, block) | np.isin(np.arange(T), chosen)) & _causal(T)
    return seen


def pooled_blocks(q: np.ndarray, k: np.ndarray, count: int, block: int) -> np.ndarray:
    """MInference, algorithm 3: means of blocks, the largest products."""
    T, N, _ = q.shape
    seen = np.zeros((N, T, T), bool)
    starts = range(0, T, block)
    for n in range(N):
        for i in starts:
            mean = q[i : i + block, n].mean(axis=0)
            score = [mean @ k[n, j : j + block].mean(axis=0) for j in starts if j <= i]
            for j in {i // block, *np.argsort(-np.array(score), kind="stable")[:count]}:
                seen[n, i : i + block, j * block : (j + 1) * block] = True
    return seen & _causal(T)


def zipvl_prompt(q: np.ndarray, k: np.ndarray, tau: float, probes: int, block: int) -> np.ndarray:
    """ZipVL, section 3: a count by the threshold, that many tokens by normalised attention, the same for all heads."""
    T, N, _ = q.shape
    p = _probabilities(q, k, probes)
    received = p.sum(axis=(0, 1))
    count, reached = 0, 0.0
    for x in np.sort(received)[::-1]:
        if reached >= tau * received.sum():
            break
        count, reached = count + 1, reached + x
    salience = received / np.minimum(p.shape[1], T - np.arange(T))
    chosen = np.argsort(-salience, kind="stable")[:count]
    seen = _in_blocks(np.zeros((T, T), bool), block) | np.isin(np.arange(T), chosen)
    return np.broadcast_to(seen & _causal(T), (N, T, T))
