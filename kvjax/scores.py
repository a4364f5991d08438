"""What a slot is worth: the scores that eviction methods share.

Every function returns a `Scorer`; scores are f32[B, K, S], the highest are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax import sharding
from kvjax.observation import ALL, LayerObservation, Needs, Reread, newest
from kvjax.rope import re_rotate
from kvjax.score_wrappers import blend, crushed, in_blocks, output_perturbation, over_heads, strongest
from kvjax.scores_by_pair import gumbel_attention, noncausal_attention, recurrence, slots_of_call
from kvjax.scores_of_keys import lag_relative, leverage, redundancy
from kvjax.segments.protocol import Ranks
from kvjax.segments.segment import Segment
from kvjax.segments.slots import token_order, without_rounding
from kvjax.transforms.evict import Scorer
from kvjax.transforms.evict_across_layers import LayerWeights
from pallas_kernels.attention_mass import Reduce
from pallas_kernels.logits import factor

Pooling = Literal["avg", "max"]


def random(seed: int) -> Scorer:
    """A pseudo-random number per (seed, layer, head, token): the same for a token at every call."""

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        K = segment.pos.shape[1]
        key = jax.random.fold_in(jax.random.key(seed), seen.layer)
        heads = jax.vmap(lambda h: jax.random.fold_in(key, h))(jnp.arange(K))
        draw = lambda head, pos: jax.random.uniform(jax.random.fold_in(head, pos))
        per_head = jax.vmap(jax.vmap(draw, in_axes=(None, 0)))  # [K], [K, S]
        return jax.vmap(per_head, in_axes=(None, 0))(heads, segment.pos)

    return Scorer(score=score)


def negative_key_norm() -> Scorer:
    """`-||k||_2`: keys of small norm attract attention."""

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        return without_rounding(-jnp.linalg.norm(segment.k.astype(jnp.float32), axis=-1))

    return Scorer(score=score)


def key_difference() -> Scorer:
    """`-cos(k, mean of the unit keys)`, over the occupied slots of a head: distinct keys are worth more."""

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        unit = _unit(segment.k.astype(jnp.float32))
        occupied = (segment.pos >= 0)[..., None]
        count = jnp.maximum(jnp.sum(occupied, axis=2, keepdims=True), 1)
        anchor = jnp.sum(jnp.where(occupied, unit, 0.0), axis=2, keepdims=True) / count
        return without_rounding(-jnp.sum(unit * _unit(anchor), axis=-1))

    return Scorer(score=score)


def window_attention(
    window: int, kernel: int = 5, pooling: Pooling = "avg", spread: float = 0.0
) -> Scorer:
    """Mean attention from the last `window` queries, group-averaged, then pooled over neighbouring tokens.

    `s[k, j] = pool_kernel(mean_g (mean_q p[k, g, q, j] + spread * var_q p[k, g, q, j]))`. Pooling runs over the
    slots older than the window in token order; the window itself should be protected by `recent=window`.

    Args:
      window: [W] queries.
      kernel: pooled tokens, odd; zeros beyond the ends count, as in torch's pooling.
      pooling: "avg" or "max".
      spread: weight of the unbiased variance over the queries (CAKE's gamma).
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 query, got {window}.")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 1, got {kernel}.")
    if pooling not in ("avg", "max"):
        raise ValueError(f"pooling must be 'avg' or 'max', got {pooling!r}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        seen = newest(seen, window)
        mass = _group_mean(_mass(segment, seen), segment) / window
        if spread:
            mass = mass + spread * _group_mean(_variance(segment, seen), segment)
        last = jnp.max(segment.pos, axis=-1, keepdims=True)
        mass = jnp.where(segment.pos <= last - window, mass, 0.0)
        return _pool_in_token_order(mass, segment.pos, kernel, pooling)

    return Scorer(score=score, needs=Needs(queries=window))


def reconstruction(how: Reread = Reread()) -> Scorer:
    """The largest probability a slot receives while the decoder repeats the prompt, over its query group.

    Args:
      how: chunks and instruction of the second reading; see `kvjax.reread`.

    Source: Kim et al., KVzip (2025), arXiv:2505.23416.
    """

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        if seen.reread is None:
            raise TypeError("reconstruction scores a prompt when it is in: wrap what uses it in at_prefill_end.")
        return jnp.take_along_axis(seen.reread, jnp.maximum(segment.pos, 0), axis=-1)

    return Scorer(score=score, needs=Needs(reread=how))


def dispersion(window: int, entropy: float = 1.0, variance: float = 1.0) -> LayerWeights:
    """How much of the context a layer uses, and how much that changes from token to token.

    With p of the last W queries over the slots older than the window:
    `w = (-sum_{n, q, j} p log p) ** entropy * (sum_{n, j} var_q p) ** variance`, the variance unbiased.

    Args:
      window: [W] queries; a scorer beside it must ask for as many.
      entropy: exponent, `1 / tau_1` of the paper.
      variance: exponent, `1 / tau_2`.

    Source: Qin et al., CAKE (2025), section 3.
    """
    if entropy < 0 or variance < 0:
        raise ValueError(f"entropy and variance must be at least 0, got {entropy} and {variance}.")

    def weight(segment: Segment, seen: LayerObservation) -> jax.Array:
        seen = newest(seen, window)
        last = jnp.max(segment.pos, axis=-1, keepdims=True)
        older = (segment.pos >= 0) & (segment.pos <= last - window)
        counted = jnp.repeat(older, seen.queries.raw.shape[2] // older.shape[1], axis=1)  # [B, N, S]
        total = lambda x: jnp.sum(jnp.where(counted, x, 0.0), axis=(1, 2))
        spatial, temporal = total(_mass(segment, seen, "entropy")), total(_variance(segment, seen))
        return jnp.maximum(spatial, 0.0) ** entropy * temporal**variance

    return weight


def accumulated_attention(normalise: bool = False) -> Scorer:
    """All the attention a token has received since it was written, averaged over the query group.

    Args:
      normalise: divide by the number of queries that could see the token, which removes the advantage of
        early tokens and changes the ranking.
    """
    mass_of, seen_by = "attention", "queries"

    def observe(segment: Segment, seen: LayerObservation) -> Segment:
        mass = _group_mean(_mass(segment, seen), segment)
        stats = {**segment.stats, mass_of: segment.stats[mass_of] + mass}
        if normalise:
            q_pos = seen.queries.pos[:, None, None, :]
            could_see = (q_pos >= segment.pos[..., None]) & (segment.pos >= 0)[..., None]
            stats[seen_by] = stats[seen_by] + jnp.sum(could_see, axis=-1)
        return segment.with_slots(stats=stats)

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        if normalise:
            return segment.stats[mass_of] / jnp.maximum(segment.stats[seen_by], 1.0)
        return segment.stats[mass_of]

    return Scorer(
        score=score,
        needs=Needs(queries=ALL),
        stats=(mass_of, seen_by) if normalise else (mass_of,),
        observe=observe,
    )


def end_attention(last: int | float, reduce: Literal["sum", "max"] = "sum") -> Scorer:
    """What the last queries of a prompt give a token: the sum, averaged over the query group, or the largest of it.

    It is noted while the prompt arrives, so that it may stand beside what adds up all of its queries. Queries that
    follow the prompt are not counted.

    Args:
      last: queries, as a count or as a fraction of the prompt.
      reduce: "sum" or "max".

    Raises:
      ValueError: no queries, or another `reduce`.
    """
    if last <= 0 or (isinstance(last, float) and last > 1):
        raise ValueError(f"last must be at least 1 query, or a fraction of the prompt in (0, 1], got {last}.")
    if reduce not in ("sum", "max"):
        raise ValueError(f"reduce must be 'sum' or 'max', got {reduce!r}.")
    stat = f"end_{reduce}"

    def observe(segment: Segment, seen: LayerObservation) -> Segment:
        if seen.prompt is None:
            raise TypeError("end_attention looks at a prompt's end, and this transform does not say where it is.")
        count = jnp.ceil(last * seen.prompt - 1e-3).astype(jnp.int32) if isinstance(last, float) else last
        pos = seen.queries.pos
        if not pos.shape[1]:
            return segment
        end = seen.prompt_end
        counted = (pos >= (end - count)[:, None]) & (pos < end[:, None])
        seen = seen.replace(queries=seen.queries._replace(pos=jnp.where(counted, pos, -1)))
        given, before = _mass(segment, seen, reduce), segment.stats[stat]
        if reduce == "sum":
            after = before + _group_mean(given, segment)
        else:
            after = jnp.maximum(before, jnp.max(given.reshape(*before.shape[:2], -1, before.shape[2]), axis=2))
        return segment.with_slots(stats={**segment.stats, stat: after})

    score = lambda segment, seen: segment.stats[stat]
    return Scorer(score=score, needs=Needs(queries=ALL), stats=(stat,), observe=observe)


def accumulated_entropy() -> Scorer:
    """Of all the attention a token has received, `-sum_q p log p`, averaged over the query group.

    What spreads over many queries counts more than as much from a few that are sure, or from many that hardly look.
    """
    stat = "entropy"

    def observe(segment: Segment, seen: LayerObservation) -> Segment:
        entropy = _group_mean(_mass(segment, seen, "entropy"), segment)
        return segment.with_slots(stats={**segment.stats, stat: segment.stats[stat] + entropy})

    score = lambda segment, seen: segment.stats[stat]
    return Scorer(score=score, needs=Needs(queries=ALL), stats=(stat,), observe=observe)


def call_attention() -> Scorer:
    """All the attention a token receives from the queries of a call, averaged over the query group."""
    score = lambda segment, seen: _group_mean(_mass(segment, seen), segment)
    return Scorer(score=score, needs=Needs(queries=ALL))


def last_query_attention() -> Scorer:
    """Attention from the newest query alone, averaged over all heads: every head keeps the same tokens."""

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        mean = jnp.mean(_mass(segment, newest(seen, 1)), axis=1, keepdims=True)  # over N
        return jnp.broadcast_to(mean, segment.pos.shape)

    return Scorer(score=score, needs=Needs(queries=1), aligned=True)


def future_attention(
    future: int = 512, sinks: int = 4, covariance: bool = True, value_norm: bool = True
) -> Scorer:
    """Attention that queries still to come would pay, if they were normal with the prompt's moments.

    With mean mu and covariance C of a head's un-rotated queries (the first `sinks` left out), and R the mean
    rotation over positions `n .. n + future - 1` after a prompt of n tokens:
    `s = softmax_S(scale <k, R mu> + scale^2 / 2 k^T R C R^T k)`, averaged over the query group, times `||v||_2`.

    Args:
      future: positions over which rotations are averaged.
      sinks: first tokens, left out of the moments and of the softmax; protect them with `sinks=`.
      covariance: with the second term.
      value_norm: with the norm of the value.

    Logits that a model caps softly are taken as they were before: a cap has no place in the formula.

    Source: Devoto, Jeblick, Jegou. "Expected Attention" (2025), arXiv:2510.00636.
    """
    if future < 1 or sinks < 0:
        raise ValueError(f"future must be at least 1 and sinks at least 0, got {future} and {sinks}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        count, first, second = seen.moments[sinks][:3]
        B, N, H = first.shape
        K = segment.pos.shape[1]
        count = jnp.maximum(count, 1.0)[:, None, None]
        mean = first / count
        spread = second / count[..., None] - mean[..., None] * mean[:, :, None]  # covariance
        last = jnp.max(segment.pos, axis=(1, 2))
        after = last[:, None] + 1 + jnp.arange(future)  # [B, future]
        angle = after[..., None].astype(jnp.float32) * seen.queries.rope.inv_freq
        cos, sin = jnp.mean(jnp.cos(angle), axis=1), jnp.mean(jnp.sin(angle), axis=1)  # [B, H / 2]

        def turn(x):  # the mean rotation of the last axis
            a, b = jnp.split(x, 2, axis=-1)
            c, s = (y.reshape(B, *(1,) * (x.ndim - 2), H // 2) for y in (cos, sin))
            return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)

        scale = factor(seen.scale, H)
        keys = segment.k.astype(jnp.float32)
        grouped = lambda x: x.reshape(B, K, N // K, *x.shape[2:])
        logits = scale * jnp.einsum("bkgh,bksh->bkgs", grouped(turn(mean)), keys)
        if covariance:
            turned = turn(turn(spread).swapaxes(2, 3))  # R C R^T, as C is symmetric
            quadratic = lambda c: jnp.sum(jnp.einsum("bksh,bkhi->bksi", keys, c) * keys, axis=-1)
            each = jax.lax.map(quadratic, jnp.moveaxis(grouped(turned), 2, 0))  # one head of a group at a time
            logits = logits + scale**2 / 2 * jnp.moveaxis(each, 0, 2)
        there = (segment.pos >= sinks)[:, :, None]
        logits = jnp.where(there, logits, -1e30)
        p = jnp.mean(jnp.where(there, jax.nn.softmax(logits, axis=-1), 0.0), axis=2)
        return p * jnp.linalg.norm(segment.values.astype(jnp.float32), axis=-1) if value_norm else p

    return Scorer(score=score, needs=Needs(moments_from=(sinks,)), rotated=True)


def retaining_heads() -> Scorer:
    """What a trained network of the layer makes of a token's own query, key and value; see `retaining_scores`.

    Made once, when the token is read. The network is `LayerObservation.learned`, `hidden` and `out`; see
    `kvjax.transforms.learned`.

    Source: Huang et al., Locret (2024), arXiv:2410.01805.
    """
    name = "retaining"

    def observe(segment: Segment, seen: LayerObservation) -> Segment:
        queries, S = seen.queries, segment.pos.shape[2]
        B, T = queries.pos.shape
        if T == 0:
            return segment
        slot, there = slots_of_call(segment, queries)
        at = slot[..., None]
        k = jnp.take_along_axis(segment.k, at, axis=2)
        if segment.key_rope == "stored":
            k = re_rotate(k, -queries.pos[:, None], queries.rope)
        scores = retaining_scores(seen.learned, queries.raw, k, jnp.take_along_axis(segment.v, at, axis=2))
        slot = jnp.where(there[:, None], slot, S)  # padding writes nowhere
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(slot.shape[1])[None, :, None]
        kept = segment.stats[name].at[rows, heads, slot].set(scores, mode="drop")
        return segment.with_slots(stats={**segment.stats, name: kept})

    score = lambda segment, seen: segment.stats[name]
    return Scorer(score=score, needs=Needs(queries=ALL), stats=(name,), observe=observe)


def retaining_scores(
    head: Mapping[str, jax.Array], q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]
) -> jax.Array:
    """`silu(concat(q, k, v) hidden) out`, f32[B, K, T].

    Args:
      head: `hidden` f32[(N + 2 K) H, F] and `out` f32[F, K].
      q: [B, T, N, H], un-rotated.
      k: [B, K, T, H], un-rotated.
      v: [B, K, T, H].
    """
    B, T = q.shape[:2]
    flat = [q.reshape(B, T, -1), *(x.swapaxes(1, 2).reshape(B, T, -1) for x in (k, v))]
    x = jnp.concatenate([x.astype(jnp.float32) for x in flat], axis=-1)
    return without_rounding(jax.nn.silu(x @ head["hidden"]) @ head["out"]).swapaxes(1, 2)


def massive_activations(entries: int = 20) -> Scorer:
    """The largest |entry| of a token in the layer's input, if it is one of the `entries` largest of all; else -inf.

    Few tokens own them all, among them those that attention uses as sinks. For `protect`.

    Args:
      entries: how many entries count, at least 1.

    Source: Su et al., RotateKV (2025), arXiv:2501.16383.
    """
    if entries < 1:
        raise ValueError(f"entries must be at least 1, got {entries}.")

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        size, pos = (x[:, None, None, :entries] for x in seen.largest)
        owns = (segment.pos[..., None] == pos) & (pos >= 0)
        return jnp.max(jnp.where(owns, size, -jnp.inf), axis=-1)

    return Scorer(score=score, needs=Needs(largest_inputs=entries), aligned=True)


def _mass(segment: Segment, seen: LayerObservation, reduce: Reduce = "sum") -> jax.Array:
    how = dict(window=seen.window, scale=seen.scale, reduce=reduce)
    if segment.key_rope == "rank":
        how["ranks"] = Ranks.of(segment.pos, seen.queries)
    return sharding.mass(segment, seen.queries, seen.lse, **how)


def _variance(segment: Segment, seen: LayerObservation) -> jax.Array:
    """f32[B, N, S]: the unbiased variance of a slot's probabilities over the observed queries."""
    count = jnp.sum(seen.queries.pos >= 0, axis=1)[:, None, None]
    around = _mass(segment, seen, "squares") - _mass(segment, seen) ** 2 / jnp.maximum(count, 1)
    return jnp.maximum(around, 0.0) / jnp.maximum(count - 1, 1)


def _group_mean(per_query_head: jax.Array, segment: Segment) -> jax.Array:
    """f32[B, N, S] -> f32[B, K, S]."""
    B, N, S = per_query_head.shape
    K = segment.pos.shape[1]
    return jnp.mean(per_query_head.reshape(B, K, N // K, S), axis=2)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _pool_in_token_order(x: jax.Array, pos: jax.Array, kernel: int, pooling: Pooling) -> jax.Array:
    """Pools over neighbours in token order, wherever their slots lie."""
    order = token_order(pos)
    ordered = jnp.take_along_axis(x, order, axis=-1)
    half = kernel // 2
    padded = jnp.pad(ordered, [(0, 0), (0, 0), (half, half)])
    shifts = [padded[..., i : i + x.shape[-1]] for i in range(kernel)]
    if pooling == "avg":
        pooled = sum(shifts) / kernel
    else:
        pooled = jnp.stack(shifts).max(axis=0)
    return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)
