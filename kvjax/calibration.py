"""What offline methods measure on a model before they run: principal components, low-rank weights, head types.

Pure functions over arrays; `experiments.calibrate` feeds them text and stores what they return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.observation import LayerObservation
from kvjax.segments import DenseSegment


class Moments(NamedTuple):
    """Sums over the tokens of one layer's keys or values, per KV head."""

    count: jax.Array  # f32[]
    second: jax.Array  # f32[K, H, H]

    @classmethod
    def of(cls, x: jax.Array, pos: jax.Array) -> Moments:
        """Of the occupied slots of [B, K, S, H]."""
        x = jnp.where((pos >= 0)[..., None], x.astype(jnp.float32), 0.0)
        count = jnp.sum(pos[:, 0] >= 0, dtype=jnp.float32)
        return cls(count, jnp.einsum("bksh,bksi->khi", x, x))

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self, other)))

    def principal_components(self) -> tuple[jax.Array, jax.Array]:
        """Orthonormal axes f32[K, H, H] in columns, and mean squares along them f32[K, H], largest first.

        Nothing is subtracted: the values of attention sinks are close to zero and carry much of the attention, and cut
        axes about another mean would move them. One axis is flipped where needed, so that the axes are a rotation
        (determinant 1), as MatryoshkaKV's Cayley parametrisation wants.
        """
        power, axes = jnp.linalg.eigh(self.second / self.count)
        power, axes = power[:, ::-1], axes[:, :, ::-1]
        sign = jnp.sign(jnp.linalg.det(axes))
        return axes.at[:, :, -1].multiply(sign[:, None]), jnp.maximum(power, 0.0)


def weighted_components(second: jax.Array, metric: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Directions to keep of a vector x whose errors e cost `e^T M e`: `x ~ X C^T x`, C and X cut to R columns.

    With `M = S S` and eigenvectors W of `S E[x x^T] S`, `C = S W`, `X = S^-1 W`; no other map of rank R has a smaller
    expected cost. With M the second moment of queries, the cost is that of their logits over keys x.

    Args:
      second: f32[..., H, H], E[x x^T].
      metric: f32[..., H, H], M; directions that cost less than 1e-4 of the average count as if they cost that much.

    Returns:
      C and X, f32[..., H, H], columns by falling share of the cost; `C^T X` is the identity.

    Source: Lesens, Rakhshan, Rabusseau, KQ-SVD (2026), arXiv:2512.05916, in terms of second moments.
    """
    values, vectors = jnp.linalg.eigh(metric)
    values = jnp.maximum(values, 1e-4 * jnp.mean(values, axis=-1, keepdims=True))
    power = lambda p: (vectors * (values**p)[..., None, :]) @ vectors.mT
    root = power(0.5)
    _, axes = jnp.linalg.eigh(root @ second @ root)
    axes = axes[..., ::-1]
    return root @ axes, power(-0.5) @ axes


def greedy_ranks(
    errors: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, ...],
    channels: int,
    rates: Sequence[float],
    *,
    step: int,
    share: float = 0.75,
) -> list[np.ndarray]:
    """Ranks by a greedy search: in every round, what costs least gives up `step` columns.

    Args:
      errors: from ranks i32[shape], what it costs to take `step` from each entry alone, f32[shape].
      shape: of the entries.
      channels: H, the rank that all start from.
      rates: mean ranks to pass through, as fractions of H, falling.
      step: columns given up at a time, and the fewest that an entry keeps.
      share: fraction of the entries that give up columns in a round (1536 of 2048 in the official code).

    Returns:
      i32[shape] ranks for each rate; the last round before a rate takes from no more entries than needed.

    Source: Lin et al., MatryoshkaKV (2025), arXiv:2410.14731, `cal_adaptive_rate.py`.
    """
    ranks, found = np.full(shape, channels, np.int32), []
    for rate in rates:
        while (excess := ranks.sum() - rate * channels * ranks.size) > 0:
            cost = np.where(ranks > step, errors(ranks), np.inf)
            count = min(math.ceil(excess / step), max(1, int(share * ranks.size)), int((ranks > step).sum()))
            if count == 0:
                raise ValueError(f"rates must leave {step} of {channels} columns to every entry, got {rate}.")
            cheapest = np.argsort(cost, axis=None, kind="stable")[:count]
            ranks = ranks.copy()
            ranks.flat[cheapest] -= step
        found.append(ranks)
    return found


def activation_aware_svd(weight: jax.Array, mean_abs: jax.Array, power: float = 0.5) -> tuple[jax.Array, jax.Array]:
    """Right singular vectors of `diag(mean_abs ** power) W`: the directions of `x W` that activations use.

    `x W` projected on the first R of them is the rank-R approximation that ASVD makes of the layer.

    Args:
      weight: f32[D, n], W of `x W`.
      mean_abs: f32[D], mean absolute value of each channel of x.
      power: how much activations count.

    Returns:
      f32[n, n], directions in columns, and f32[n], singular values, largest first.

    Source: Yuan et al., ASVD (2023), arXiv:2312.05821, as CSKV uses it.
    """
    scaled = weight.astype(jnp.float32) * (mean_abs.astype(jnp.float32) ** power)[:, None]
    _, values, right = jnp.linalg.svd(scaled, full_matrices=False)
    return right.T, values


def copying_scores(keys: DenseSegment, seen: LayerObservation, period: int) -> tuple[jax.Array, jax.Array]:
    """How much heads look for earlier copies, over a text of `period` random tokens repeated several times.

    Args:
      keys: the layer's cache after the whole text, rotated keys, one row.
      seen: all queries of the text with their lse.
      period: tokens after which the text repeats; the last query has position `R * period - 1`.

    Returns:
      f32[K] echo: mean probability, from the second repetition on, that a query gives earlier copies of its own
      token; f32[K] induction: the same for the tokens after those copies. Both are the highest of a query group.

    Source: Tang et al., RazorAttention (2024), arXiv:2407.15891, section 3.2.
    """
    mass = lambda query_at, key_at: _probability(keys, seen, query_at, key_at)
    T = keys.pos.shape[2]
    echo, induction = 0.0, 0.0
    for back in range(1, T // period):
        at = jnp.arange(back * period, T)
        echo = echo + jnp.sum(mass(at, at - back * period), axis=0)
        induction = induction + jnp.sum(mass(at, at - back * period + 1), axis=0)
    per_kv_head = lambda x: jnp.max((x / (T - period)).reshape(keys.pos.shape[1], -1), axis=-1)
    return per_kv_head(echo), per_kv_head(induction)


def _probability(keys: DenseSegment, seen: LayerObservation, query_at: jax.Array, key_at: jax.Array) -> jax.Array:
    """f32[n, N]: what each of n queries gives one slot each."""
    q = seen.queries.rotated[0, query_at].astype(jnp.float32)  # [n, N, H]
    K, H = keys.k.shape[1], keys.k.shape[-1]
    k = keys.k[0][:, key_at].astype(jnp.float32)  # [K, n, H]
    scale = H**-0.5 if seen.scale is None else seen.scale
    logit = scale * jnp.einsum("nkgh,knh->nkg", q.reshape(q.shape[0], K, -1, H), k)
    return jnp.exp(logit.reshape(q.shape[:2]) - seen.lse[0, query_at])
