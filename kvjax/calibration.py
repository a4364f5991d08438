"""What offline methods measure on a model before they run: components, codebooks, head and layer types.

Pure functions over arrays; `experiments.calibrate` feeds them text and stores what they return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from kvjax.observation import LayerObservation
from kvjax.segments import Segment
from pallas_kernels.logits import capped, factor


class Moments(NamedTuple):
    """Sums over the tokens of one layer's keys or values, per KV head."""

    count: jax.Array  # f32[]
    second: Float32[Array, "K H H"]

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


def weighted_components(
    second: Float32[Array, "... H H"], metric: Float32[Array, "... H H"]
) -> tuple[jax.Array, jax.Array]:
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


def activation_aware_svd(
    weight: Float32[Array, "D n"], mean_abs: Float32[Array, " D"], power: float = 0.5
) -> tuple[jax.Array, jax.Array]:
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


def product_codebook(
    x: Float32[Array, "n H"], width: int, centroids: int, key: jax.Array, iterations: int = 12
) -> Float32[Array, "H/width C width"]:
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


def copying_scores(keys: Segment, seen: LayerObservation, period: int) -> tuple[jax.Array, jax.Array]:
    """How much heads look for earlier copies, over a text of `period` random tokens repeated several times.

    Args:
      keys: the layer's cache after the whole text, rotated keys, one row.
      seen: all queries of the text with their lse.
      period: tokens after which the text repeats; the last query has position `R * period - 1`.

    Returns:
      f32[K] echo: mean probability, from the second repetition on, that a query gives an earlier copy of its own
      token, of several their mean; f32[K] induction: the same for the tokens after those copies. Both are the highest
      of a query group.

    Source: Tang et al., RazorAttention (2024), arXiv:2407.15891, section 3.2.
    """
    mass = lambda query_at, key_at: _probability(keys, seen, query_at, key_at)
    T = keys.pos.shape[2]
    echo, induction = 0.0, 0.0
    for back in range(1, T // period):
        at = jnp.arange(back * period, T)
        copies = (at // period)[:, None]  # earlier ones of each query
        echo = echo + jnp.sum(mass(at, at - back * period) / copies, axis=0)
        induction = induction + jnp.sum(mass(at, at - back * period + 1) / copies, axis=0)
    per_kv_head = lambda x: jnp.max((x / (T - period)).reshape(keys.pos.shape[1], -1), axis=-1)
    return per_kv_head(echo), per_kv_head(induction)


def retrieval_scores(
    keys: Segment, seen: LayerObservation, needle_at: Int32[Array, " m"], query_at: Int32[Array, " n"]
) -> Float32[Array, " K"]:
    """f32[K]: how much of the attention of queries that quote a needle goes to it, among what they attend to most.

    For each query, the probabilities of those of its m most attended tokens that lie in the needle, over m; averaged
    over the queries and over the query group.

    Args:
      keys: the layer's cache after the whole text, rotated keys, one row, token t in slot t.
      seen: all queries of the text with their lse.
      needle_at: i32[m], positions of the needle.
      query_at: i32[n], positions of the queries.

    Source: Fu et al., HeadKV (2024), arXiv:2410.19258, section 3.1; after Wu et al., retrieval heads (2024).
    """
    picked = lambda x: x[:, query_at]
    queries = seen.queries._replace(raw=picked(seen.queries.raw), pos=picked(seen.queries.pos))
    K, S = keys.pos.shape[1:]
    each = lambda q, lse: keys.mass(q, lse, window=seen.window, scale=seen.scale)[0]
    one = lambda raw, pos, lse: each(queries._replace(raw=raw[None, None], pos=pos[None, None]), lse[None, None])
    p = jax.lax.map(lambda of: one(*of), (queries.raw[0], queries.pos[0], picked(seen.lse)[0]))  # [n, N, S]
    most, index = jax.lax.top_k(p, needle_at.shape[0])
    found = jnp.any(index[..., None] == needle_at, axis=-1)
    share = jnp.sum(jnp.where(found, most, 0.0), axis=-1) / needle_at.shape[0]
    return jnp.mean(share.reshape(share.shape[0], K, -1), axis=(0, 2))


def attention_variance(keys: Segment, seen: LayerObservation) -> jax.Array:
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


def attention_coverage(keys: Segment, seen: LayerObservation, points: int = 256) -> Float32[Array, " points+1"]:
    """f32[points + 1]: the share of attention that the fraction `i / points` of tokens received, the highest first.

    Attention is summed over the queries of a text and averaged over heads.

    Args:
      keys: the layer's cache after the whole text, one row.
      seen: all queries of the text with their lse.
      points: of the curve.

    Source: Wang et al., PrefixKV (2024), arXiv:2412.03409, section 3.2.
    """
    received = keys.mass(seen.queries, seen.lse, window=seen.window, scale=seen.scale)  # [1, N, S]
    highest_first = -jnp.sort(-jnp.mean(received, axis=(0, 1)))
    share = jnp.pad(jnp.cumsum(highest_first) / jnp.sum(highest_first), (1, 0))
    S = highest_first.shape[0]
    return jnp.interp(jnp.linspace(0.0, 1.0, points + 1), jnp.arange(S + 1) / S, share)


def _probability(keys: Segment, seen: LayerObservation, query_at: jax.Array, key_at: jax.Array) -> jax.Array:
    """f32[n, N]: what each of n queries gives one slot each."""
    q = seen.queries.rotated[0, query_at].astype(jnp.float32)  # [n, N, H]
    K, H = keys.k.shape[1], keys.k.shape[-1]
    k = keys.k[0][:, key_at].astype(jnp.float32)  # [K, n, H]
    logit = factor(seen.scale, H) * jnp.einsum("nkgh,knh->nkg", q.reshape(q.shape[0], K, -1, H), k)
    return jnp.exp(capped(logit.reshape(q.shape[:2]), seen.scale) - seen.lse[0, query_at])
