"""Attention that the decoder did not compute, from all pairs of queries and slots: perturbed, or non-causal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.observation import ALL, LayerObservation, Needs
from kvjax.segments.protocol import Queries
from kvjax.segments.segment import Segment
from kvjax.segments.slots import token_order, without_rounding
from kvjax.transforms.evict import Scorer
from pallas_kernels.logits import capped, factor

_BLOCK = 64  # queries whose logits exist at a time


def gumbel_attention(temperature: float = 1.0, growth: float = 0.01, noise: float = 1.0, seed: int = 0) -> Scorer:
    """All the tempered, perturbed attention a token has received, averaged over the query group.

    A query adds `softmax_j((x_j + noise * z_j) / tau)`, x its logits over the slots it sees and z of the standard
    Gumbel distribution, drawn anew for every query, slot, head and layer. `tau = temperature + growth * t` for the t-th
    token after the prompt, `temperature` for those of the prompt.

    Args:
      temperature: of the prompt's queries, above 0.
      growth: of the temperature with every token that follows.
      noise: factor of the noise; 0 draws none.
      seed: of the noise; a query and a slot get the same at every call and in every row.

    Source: Adnan et al., Keyformer (2024), arXiv:2403.09054, section 3.2 and its official code.
    """
    if temperature <= 0 or growth < 0 or noise < 0:
        raise ValueError(
            f"temperature must be above 0, growth and noise at least 0, got {temperature}, {growth} and {noise}."
        )
    stat = "perturbed_attention"

    def observe(segment: Segment, seen: LayerObservation) -> Segment:
        if seen.prompt is None:
            raise TypeError("gumbel_attention counts from a prompt's end, and this transform does not say where it is.")
        queries = seen.queries
        B, T, N, H = queries.raw.shape
        K, S = segment.pos.shape[1:]
        if not T or not S:
            return segment
        keys, k_pos = segment.k.astype(jnp.float32), segment.pos[:, :, None, None]
        heads = (jnp.arange(N) + N * seen.layer).reshape(K, N // K, 1, 1)
        size = min(T, _BLOCK)

        def add(total, block):
            q, pos, _ = block  # [B, t, N, H], i32[B, t]
            grouped = q.reshape(B, size, K, N // K, H)
            logits = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, precision=jax.lax.Precision.HIGHEST)
            logits = capped(factor(seen.scale, H) * logits, seen.scale)
            q_pos = pos[:, None, None, :, None]
            if noise:
                logits = logits + noise * _gumbel(seed, heads, q_pos, k_pos)
            later = jnp.maximum(q_pos - seen.prompt_end[:, None, None, None, None] + 1, 0)
            logits = logits / (temperature + growth * later)
            sees = (k_pos >= 0) & (k_pos <= q_pos)
            if seen.window is not None:
                sees &= k_pos > q_pos - seen.window
            p = jax.nn.softmax(jnp.where(sees, logits, -1e30), axis=-1)
            return total + jnp.mean(jnp.sum(jnp.where(sees, p, 0.0), axis=3), axis=2), None

        received, _ = jax.lax.scan(add, jnp.zeros(segment.pos.shape, jnp.float32), _query_blocks(seen, size))
        return segment.with_slots(stats={**segment.stats, stat: segment.stats[stat] + received})

    score = lambda segment, seen: segment.stats[stat]
    return Scorer(score=score, needs=Needs(queries=ALL), stats=(stat,), observe=observe, rotated=True)


def _gumbel(seed: int, *numbers: jax.Array) -> jax.Array:
    """f32: standard Gumbel noise that is a function of a seed and of integers, which broadcast."""
    mixed = jnp.uint32(seed & 0xFFFFFFFF)
    for x in numbers:
        mixed = _mixed(mixed ^ x.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))
    uniform = ((mixed >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # in (0, 1), exact
    return -jnp.log(-jnp.log(uniform))


def _mixed(x: jax.Array) -> jax.Array:
    """u32: the finaliser of MurmurHash3, a permutation that spreads every bit."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16


def noncausal_attention(chunk: int = 256, sinks: int = 8) -> Scorer:
    """What a token receives from all tokens of its chunk, those before it too, times `||v||_2`, pooled over three.

    Positions are cut into chunks of `chunk`, the first one without the sinks; in each,
    `a_j = sum_i softmax_j(scale <q_i, k_j>)`, averaged over the query group. `s_j = mean(a ||v||)` over a token and its
    two neighbours, zeros beyond the ends. Sinks score -inf: protect them. A token is scored when it is read: a chunk is
    cut where a call ends, so that a prompt that comes in calls of a multiple of `chunk` is scored as one that comes at
    once.

    Args:
      chunk: tokens that attend to each other.
      sinks: first tokens, which take no part.

    Source: Chari, Van Durme. Compactor (2025), arXiv:2507.08143; kvpress, `NonCausalAttnPress`.
    """
    if chunk < 1 or sinks < 0:
        raise ValueError(f"chunk must be at least 1 token and sinks at least 0, got {chunk} and {sinks}.")
    stat = "noncausal_attention"

    def observe(segment: Segment, seen: LayerObservation) -> Segment:
        queries = seen.queries
        B, T, N, H = queries.raw.shape
        K, S = segment.pos.shape[1:]
        if not T or not S:
            return segment
        slot, there = slots_of_call(segment, queries)
        q, k = queries.rotated.astype(jnp.float32), jnp.take_along_axis(segment.k, slot[..., None], axis=2)
        first = queries.pos[:, :1]
        start = jnp.maximum(first, 0) // chunk * chunk - first  # of the first chunk, in the call

        def of_chunk(index):
            at = start + index * chunk + jnp.arange(chunk)  # [B, chunk]
            inside = (at >= 0) & (at < T)
            at = jnp.clip(at, 0, T - 1)
            inside &= jnp.take_along_axis(there & (queries.pos >= sinks), at, axis=1)
            mine = jnp.take_along_axis(q, at[..., None, None], axis=1).reshape(B, chunk, K, N // K, H)
            keys = jnp.take_along_axis(k, at[:, None, :, None], axis=2).astype(jnp.float32)
            logits = jnp.einsum("btkgh,bksh->bkgts", mine, keys, precision=jax.lax.Precision.HIGHEST)
            logits = capped(factor(seen.scale, H) * logits, seen.scale)
            p = jax.nn.softmax(jnp.where(inside[:, None, None, None], logits, -1e30), axis=-1)
            p = jnp.where(inside[:, None, None, :, None] & inside[:, None, None, None], p, 0.0)
            return jnp.mean(jnp.sum(p, axis=3), axis=2), jnp.where(inside, at, T)  # [B, K, chunk], [B, chunk]

        received, at = jax.lax.map(of_chunk, jnp.arange(-(-T // chunk) + 1))
        # From chunks to the call's tokens, and from these to their slots.
        flat = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
        of_token = jnp.zeros((B, K, T)).at[rows, heads, flat(at)[:, None]].set(flat(received), mode="drop")
        to = jnp.where(there[:, None], slot, S)
        scored = segment.stats[stat].at[rows, heads, to].set(of_token, mode="drop")
        return segment.with_slots(stats={**segment.stats, stat: scored})

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        norm = jnp.linalg.norm(segment.values.astype(jnp.float32), axis=-1)
        order = token_order(segment.pos)
        received = jnp.where(segment.pos >= sinks, segment.stats[stat] * norm, 0.0)
        padded = jnp.pad(jnp.take_along_axis(received, order, axis=-1), ((0, 0), (0, 0), (1, 1)))
        pooled = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
        pooled = jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(segment.pos >= sinks, without_rounding(pooled), -jnp.inf)

    return Scorer(score=score, needs=Needs(queries=ALL), stats=(stat,), observe=observe, rotated=True)


def recurrence(alpha: float = 1e-4, window: int = 128) -> Scorer:
    """How likely a token is to be attended to again, from when it was last and from how long it ever rested.

    A token is active when a query, in any head of the group, pays it more than `alpha`: each query in turn, those of a
    prompt too.
    `gap` is its longest rest between two activities (being written is the first), `idle` its rest by now:
    `s = 2 sigmoid(-idle / gap) + 2 sigmoid(-gap / window)`. A token that has not come back since it was written
    has 1 while `idle == 0`, then `0.001 / (1 + idle)`: the limit of the first term, newer tokens first.

    Args:
      alpha: probability above which a token is active.
      window: tokens that make a gap long.

    Source: Zhang et al., LazyEviction (2025), arXiv:2506.15969. The form of the second term is unverified: notes
    on the paper disagree; this one favours short gaps, as the text says, on a scale that float32 can tell apart.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1), got {alpha}.")
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}.")
    last, longest = "active_after", "gap"  # tokens from a slot's own position to its last activity; tokens

    def observe(segment: Segment, seen: LayerObservation) -> Segment:
        T, S = seen.queries.pos.shape[1], segment.pos.shape[2]
        if not T or not S:
            return segment
        size = min(T, _BLOCK)

        def note(carry, block):
            until, longest_rest = carry  # i32[B, K, S]: position of the last activity; the longest rest
            active = _probabilities(segment, seen, *block).max(axis=2) > alpha  # [B, K, t, S]
            at = jnp.where(active, block[1][:, None, :, None], -1)
            # The last activity before each query of the block: its own position counts from one query on.
            before = jnp.maximum(jax.lax.cummax(at, axis=2), until[:, :, None])
            before = jnp.concatenate([until[:, :, None], before[:, :, :-1]], axis=2)
            rest = jnp.max(jnp.where(active, at - before, 0), axis=2)
            return (jnp.maximum(until, jnp.max(at, axis=2)), jnp.maximum(longest_rest, rest)), None

        until = segment.pos + segment.stats[last].astype(jnp.int32)
        start = (until, segment.stats[longest].astype(jnp.int32))
        (until, rest), _ = jax.lax.scan(note, start, _query_blocks(seen, size))
        occupied = segment.pos >= 0
        after = {last: jnp.where(occupied, until - segment.pos, 0), longest: jnp.where(occupied, rest, 0)}
        return segment.with_slots(stats={**segment.stats, **{name: x.astype(jnp.float32) for name, x in after.items()}})

    def score(segment: Segment, seen: LayerObservation) -> jax.Array:
        now = jnp.max(segment.pos, axis=-1, keepdims=True)
        idle = now - segment.pos - segment.stats[last]
        gap = segment.stats[longest]
        overdue = 2 * jax.nn.sigmoid(-idle / jnp.maximum(gap, 1.0)) + 2 * jax.nn.sigmoid(-gap / window)
        once = jnp.where(idle <= 0, 1.0, 1e-3 / (1.0 + jnp.maximum(idle, 0.0)))
        return jnp.where(gap > 0, overdue, once)

    return Scorer(score=score, needs=Needs(queries=ALL), stats=(last, longest), observe=observe, rotated=True)


def slots_of_call(segment: Segment, queries: Queries) -> tuple[jax.Array, jax.Array]:
    """Finds the slots of the tokens that a call brought: i32[B, K, T], and bool[B, T], which are real.

    The tokens of a call are the newest of every head; its queries come in their order, padding last.
    """
    T, S = queries.pos.shape[1], segment.pos.shape[2]
    newest_first = jax.lax.top_k(segment.pos, min(T, S))[1]  # [B, K, T]
    new = jnp.sum(queries.pos >= 0, axis=1)[:, None]
    place = new - 1 - jnp.arange(T)[None]  # [B, T], of each query among the newest
    there = (place >= 0) & (place < newest_first.shape[2])
    slot = jnp.take_along_axis(newest_first, jnp.clip(place, 0, newest_first.shape[2] - 1)[:, None], axis=2)
    return slot, there


def _query_blocks(seen: LayerObservation, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A call's rotated queries, their positions and their lse, [blocks, B, size, ...] each, padding last."""
    queries, T = seen.queries, seen.queries.pos.shape[1]
    count = -(-T // size)

    def blocks(x, fill):
        x = jnp.pad(x, [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    rotated = blocks(queries.rotated.astype(jnp.float32), 0.0)
    return rotated, blocks(queries.pos, -1), blocks(seen.lse, 0.0)


def _probabilities(
    segment: Segment, seen: LayerObservation, q: jax.Array, pos: jax.Array, lse: jax.Array
) -> jax.Array:
    """f32[B, K, G, t, S]: what each of t rotated queries [B, t, N, H] gives each slot."""
    B, t, N, H = q.shape
    K = segment.pos.shape[1]
    grouped = lambda x: x.reshape(B, t, K, N // K, *x.shape[3:])
    keys, k_pos, q_pos = segment.k.astype(jnp.float32), segment.pos[:, :, None, None], pos[:, None, None, :, None]
    logits = jnp.einsum("btkgh,bksh->bkgts", grouped(q), keys, precision=jax.lax.Precision.HIGHEST)
    logits = capped(factor(seen.scale, H) * logits, seen.scale)
    if segment.bias is not None:
        logits = logits + segment.bias[:, :, None, None]
    sees = (k_pos >= 0) & (k_pos <= q_pos)
    if seen.window is not None:
        sees &= k_pos > q_pos - seen.window
    total = jnp.moveaxis(grouped(lse), 1, 3)[..., None]
    return jnp.exp(jnp.where(sees, logits - jnp.where(total == -jnp.inf, 0.0, total), -jnp.inf))
