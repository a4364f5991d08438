"""What offline methods measure on a model before they run: components, codebooks, head and layer types.

Pure functions over arrays; `experiments.calibrate` feeds them text and stores what they return.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.observation import LayerObservation
from kvjax.segments import DenseSegment


class Moments(NamedTuple):
    """Sums over the tokens of one layer's keys or values, per KV head."""

    count: jax.Array  # f32[]
    first: jax.Array  # f32[K, H]
    second: jax.Array  # f32[K, H, H]

    @classmethod
    def of(cls, x: jax.Array, pos: jax.Array) -> Moments:
        """Of the occupied slots of [B, K, S, H]."""
        x = jnp.where((pos >= 0)[..., None], x.astype(jnp.float32), 0.0)
        count = jnp.sum(pos[:, 0] >= 0, dtype=jnp.float32)
        return cls(count, jnp.sum(x, axis=(0, 2)), jnp.einsum("bksh,bksi->khi", x, x))

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self, other)))

    def principal_components(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean f32[K, H], orthonormal axes f32[K, H, H] in columns, and variances f32[K, H], largest first.

        One axis is flipped where needed, so that the axes are a rotation (determinant 1), as MatryoshkaKV's
        Cayley parametrisation wants.
        """
        mean = self.first / self.count
        covariance = self.second / self.count - mean[:, :, None] * mean[:, None]
        variance, axes = jnp.linalg.eigh(covariance)
        variance, axes = variance[:, ::-1], axes[:, :, ::-1]
        sign = jnp.sign(jnp.linalg.det(axes))
        return mean, axes.at[:, :, -1].multiply(sign[:, None]), jnp.maximum(variance, 0.0)


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


def product_codebook(x: jax.Array, width: int, centroids: int, key: jax.Array, iterations: int = 12) -> jax.Array:
    """Centroids of the sub-vectors of x, by Lloyd's algorithm from k-means++ seeds.

    A seed is one of 4 C vectors at even distances in x, drawn with probability proportional to its squared distance
    from the seeds before it. A centroid without vectors stays where it is.

    Args:
      x: f32[n, H].
      width: channels of a sub-vector; divides H.
      centroids: [C], at most n.
      key: PRNG key of the seeds.
      iterations: of assignment and mean.

    Returns:
      f32[H / width, C, width].

    Source: Arthur and Vassilvitskii, k-means++ (2007); Lloyd (1982).
    """
    n, H = x.shape
    if H % width or not 1 <= centroids <= n:
        raise ValueError(f"width must divide {H} and centroids be from 1 to {n}, got {width} and {centroids}.")
    parts = x.astype(jnp.float32).reshape(n, H // width, width).swapaxes(0, 1)

    def one(part_and_key):
        part, key = part_and_key  # [n, width]
        few = part[:: max(n // (4 * centroids), 1)]
        squared = lambda center: jnp.sum((few - center) ** 2, axis=-1)

        def seed(c, found):
            centers, nearest = found
            below = jnp.cumsum(nearest)
            drawn = few[jnp.minimum(jnp.searchsorted(below, below[-1] * chance[c], side="right"), len(few) - 1)]
            return centers.at[c].set(drawn), jnp.minimum(nearest, squared(drawn))

        chance = jax.random.uniform(key, (centroids,))
        first = few[(chance[0] * len(few)).astype(jnp.int32)]
        start = jnp.zeros((centroids, width)).at[0].set(first), squared(first)
        centers, _ = jax.lax.fori_loop(1, centroids, seed, start)

        def step(_, centers):
            distance = sum(centers[:, i] * (centers[:, i] - 2 * part[:, i, None]) for i in range(width))
            owner = jnp.argmin(distance, axis=-1)
            count = jax.ops.segment_sum(jnp.ones(n), owner, centroids)
            total = jax.ops.segment_sum(part, owner, centroids)
            return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1.0)[:, None], centers)

        return jax.lax.fori_loop(0, iterations, step, centers)

    return jax.lax.map(one, (parts, jax.random.split(key, H // width)))


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


def attention_variance(keys: DenseSegment, seen: LayerObservation) -> jax.Array:
    """f32[]: how unevenly a layer's heads spread their attention over a text, 0 for evenly.

    The variance over tokens of the attention each received, scaled to [0, 1] over the query heads, and averaged over
    them.

    Args:
      keys: the layer's cache after the whole text.
      seen: all queries of the text with their lse.

    Source: Wan et al., D2O (2024), section 3.2 and its official code.
    """
    received = keys.mass(seen.queries, seen.lse, window=seen.window, scale=seen.scale)  # [B, N, S]
    variance = jnp.mean(jnp.var(received, axis=-1), axis=0)
    low, high = jnp.min(variance), jnp.max(variance)
    return jnp.mean((variance - low) / jnp.maximum(high - low, 1e-12))


def _probability(keys: DenseSegment, seen: LayerObservation, query_at: jax.Array, key_at: jax.Array) -> jax.Array:
    """f32[n, N]: what each of n queries gives one slot each."""
    q = seen.queries.rotated[0, query_at].astype(jnp.float32)  # [n, N, H]
    K, H = keys.k.shape[1], keys.k.shape[-1]
    k = keys.k[0][:, key_at].astype(jnp.float32)  # [K, n, H]
    scale = H**-0.5 if seen.scale is None else seen.scale
    logit = scale * jnp.einsum("nkgh,knh->nkg", q.reshape(q.shape[0], K, -1, H), k)
    return jnp.exp(logit.reshape(q.shape[:2]) - seen.lse[0, query_at])
