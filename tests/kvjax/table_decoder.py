"""A decoder whose queries, keys and values are looked up, so that NumPy can follow every step of a method.

A token is an index into tables; its logits are its attention outputs, so what a cache kept, and in which order and
at which positions it was read, shows in them at once. `simulate` does the same in float64 with a policy that is
written after a paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import Queries, Rope, StepOutput, empty_cache, rotate
from kvjax.observation import observe
from pallas_kernels.prefill_attention import prefill_attention

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, VOCAB, BASE = 2, 4, 2, 8, 512, 100.0
GROUP = QUERY_HEADS // KV_HEADS


class Tables(NamedTuple):
    """Un-rotated queries, keys and values of every token in every layer."""

    q: np.ndarray  # [L, V, N, H]
    k: np.ndarray  # [L, V, K, H]
    v: np.ndarray  # [L, V, K, H]


def tables(seed: int = 0) -> Tables:
    """Random tables; keys of very different norms, a few of which everyone looks at."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(LAYERS, VOCAB, QUERY_HEADS, HEAD_DIM)) + 0.5
    k, v = rng.normal(size=(2, LAYERS, VOCAB, KV_HEADS, HEAD_DIM))
    k = k * rng.uniform(0.3, 2.0, size=(LAYERS, VOCAB, KV_HEADS, 1))
    return Tables(*(x.astype(np.float32) for x in (q, k, v)))


def distinct_tokens(batch: int, count: int, seed: int = 0) -> np.ndarray:
    """Tokens [batch, count], none twice in a row.

    Equal tokens have equal keys and inputs: where a method keeps the largest, rounding would choose between them.
    """
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(VOCAB)[:count] for _ in range(batch)])


def empty(batch: int):
    """A cache without slots."""
    return empty_cache(batch=batch, layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, slots=0)


def decoder(tables: Tables):
    """A `kvjax.Step` over the tables; its "logits" are f32[B, T, L * N * H]."""
    rope = Rope.from_base(BASE, HEAD_DIM)
    tables = Tables(*map(jnp.asarray, tables))

    def step(tokens, positions, cache, *, needs, last_only):
        T = tokens.shape[1]
        layers, seen, outs = [], [], []
        for index, layer in enumerate(cache.layers):
            q, k, v = (x[index][tokens] for x in tables)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            queries = Queries(q, positions, rope, ahead=jnp.arange(T)[None])
            own = prefill_attention(queries.rotated, rotate(k, positions[:, None], rope), v, positions)
            attended = layer.attend(queries, shared=cache.shared, new=own)
            layers.append(layer.append(k, v, positions, rope, after=attended))
            inputs = q.reshape(*tokens.shape, -1)  # as if queries were what a layer reads
            seen.append(observe(queries, attended.lse, needs, jnp.int32(index), inputs=inputs))
            outs.append(attended.out.reshape(*tokens.shape, -1))
        new = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        logits = jnp.concatenate(outs, axis=-1)
        if last_only:
            logits = jnp.take_along_axis(logits, jnp.maximum(new - 1, 0)[:, None, None], axis=1)
        return StepOutput(logits, cache.replace(layers=tuple(layers), length=cache.length + new), tuple(seen))

    return jax.jit(step, static_argnames=("needs", "last_only"))


def turn(x: np.ndarray, pos: np.ndarray) -> np.ndarray:
    """Rotary positions as complex numbers: `(x[i] + j x[i + H/2]) * exp(j pos base ** (-2 i / H))`."""
    half = x.shape[-1] // 2
    freq = BASE ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.asarray(pos)[..., None] * freq)
    return np.concatenate([z.real, z.imag], axis=-1)


class Policy(Protocol):
    """What a paper decides for one layer. Called after every call of the decoder."""

    def __call__(
        self, probability: list[np.ndarray], slots: list[np.ndarray], keys: list[np.ndarray], done: bool
    ) -> list[np.ndarray]:
        """Says what to keep.

        Args:
          probability: per KV head, [G, t, n]: what each of the call's t queries gave each slot.
          slots: per KV head, [n] token positions, increasing; the last t of them are new.
          keys: per KV head, [n, H], rotated at their positions.
          done: whether the prompt is in.

        Returns:
          Per KV head, the positions that stay, increasing.
        """


class Trace(NamedTuple):
    """What a simulation saw after one call."""

    kept: list[list[list[int]]]  # per layer and KV head
    out: np.ndarray  # [L * N * H], of the call's last token


def simulate(
    tables: Tables, tokens: np.ndarray, calls: Sequence[int], prompt_calls: int, policy, reindex: bool = False
) -> list[Trace]:
    """Feeds tokens in calls of the given sizes; the first `prompt_calls` of them are the prompt.

    Args:
      tables: of the decoder.
      tokens: [sum of calls].
      calls: tokens of each call.
      prompt_calls: how many calls make the prompt.
      policy: `() -> Policy`, one for each layer.
      reindex: keys and queries are rotated at their rank among what is held, not at their position.
    """
    q, k, v = (np.asarray(x, np.float64)[:, tokens] for x in tables)
    policies = [policy() for _ in range(LAYERS)]
    held = [[np.zeros(0, int) for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    traces, start = [], 0
    for index, size in enumerate(calls):
        new = np.arange(start, start + size)
        start += size
        outs = []
        for layer in range(LAYERS):
            slots, probability, keys = [], [], []
            for head in range(KV_HEADS):
                at = np.concatenate([held[layer][head], new])
                place = np.arange(len(at)) if reindex else at
                rotated = turn(k[layer, at, head], place)
                mine = np.s_[head * GROUP : (head + 1) * GROUP]
                queries = turn(q[layer, new, mine].swapaxes(0, 1), place[-size:])  # [G, t, H]
                logits = queries @ rotated.T / np.sqrt(HEAD_DIM)
                logits = np.where(at <= new[:, None], logits, -np.inf)
                weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
                weights /= weights.sum(axis=-1, keepdims=True)
                outs.append((weights[:, -1] @ v[layer, at, head]).ravel())
                slots.append(at)
                probability.append(weights)
                keys.append(turn(k[layer, at, head], at))
            held[layer] = policies[layer](probability, slots, keys, index + 1 >= prompt_calls)
        kept = [[head.tolist() for head in layer] for layer in held]
        traces.append(Trace(kept, np.concatenate(outs)))
    return traces
