"""Attention in float64 NumPy, written head by head: what every attention kernel is compared with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Attention(NamedTuple):
    """Float64 results for queries [B, T, N, H] over S slots per KV head."""

    out: np.ndarray  # [B, T, N, H]
    lse: np.ndarray  # [B, T, N]
    probability: np.ndarray  # [B, T, N, S]


def attention(q, k, v, q_pos, k_pos, *, bias=None, window=None, scale=None) -> Attention:
    """Softmax attention with the visibility rule of `pallas_kernels.visibility`, one query head at a time.

    Args:
      q: [B, T, N, H].
      k: [B, K, S, H].
      v: [B, K, S, H'].
      q_pos: i32[B, T].
      k_pos: i32[B, K, S].
      bias: f32[B, K, S] or None.
      window: tokens, or None.
      scale: None: `H ** -0.5`.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    q_pos, k_pos = np.asarray(q_pos), np.asarray(k_pos)
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    out = np.zeros((B, T, N, v.shape[-1]))
    lse = np.full((B, T, N), -np.inf)
    probability = np.zeros((B, T, N, S))
    for b in range(B):
        for n in range(N):
            head = n // (N // K)
            slot = k_pos[b, head]
            for t in range(T):
                at = q_pos[b, t]
                seen = (slot >= 0) & (slot <= at)
                if window is not None:
                    seen &= slot > at - window
                if not seen.any():
                    continue
                logits = scale * (k[b, head, seen] @ q[b, t, n])
                if bias is not None:
                    logits = logits + np.asarray(bias, np.float64)[b, head, seen]
                top = logits.max()
                weights = np.exp(logits - top)
                lse[b, t, n] = top + np.log(weights.sum())
                probability[b, t, n, seen] = weights / weights.sum()
                out[b, t, n] = probability[b, t, n, seen] @ v[b, head, seen]
    return Attention(out, lse, probability)
