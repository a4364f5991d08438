"""A prompt read once more behind itself: what its tokens are worth to a decoder that has to repeat them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from kvjax import sharding
from kvjax.cache import Cache, LayerCache
from kvjax.observation import ALL, LayerObservation, Needs, Observation, Reread
from kvjax.segments.segment import Segment, dense_tail
from pallas_kernels.partial import combine


def reread(step, how: Reread, tokens: Int32[Array, "B T"], cache: Cache, observation: Observation) -> Observation:
    """Adds to the observation, for every slot, the largest probability that it receives while it is repeated.

    The prompt is cut into chunks. For each, the decoder reads the instruction and the chunk behind the whole cache,
    at the positions that follow. Of the chunk's own slots the result is
    `s[k, j] = max_{g, q} p[k, g, q, j]`, over all tokens q of that call, with p normalised over the first tokens
    (`how.sinks`), the chunk's slots and what was read again, not over the rest of the cache. The cache that is kept
    does not change.

    One pass over the prompt more, with every token attending to about twice as much; positions reach the prompt's
    length plus a chunk and its instruction. A smaller chunk takes less memory: its logits against the whole cache.

    Args:
      step: the decoder, a `kvjax.Step`.
      how: chunk, instruction.
      tokens: i32[B, T], prompts padded at their end.
      cache: of the whole prompt, token t in slot t of one dense segment.
      observation: of the prompt; `prompt` are its lengths.

    Source: Kim et al., KVzip (2025), section 3 and its official code.
    """
    B, T = tokens.shape
    chunk = min(how.chunk, T)
    segments = [dense_tail(layer, "reread") for layer in cache.layers]
    behind = cache.map_layers(_with_new_tail)
    script = _script(how, T, chunk)

    def read(part):
        fixed, at, start = part
        given = jnp.where(fixed >= 0, fixed, jnp.take(tokens, jnp.minimum(at, T - 1), axis=1))
        there = (observation.prompt[:, None] > start) & ((fixed >= 0) | (at < observation.prompt[:, None]))
        positions = jnp.where(there, cache.length[:, None] + jnp.arange(given.shape[1]), -1)
        out = step(given, positions, behind, needs=Needs(queries=ALL), last_only=True)
        weigh = functools.partial(_largest, chunk=chunk, sinks=how.sinks, whole=chunk == T)
        return [weigh(*each, start) for each in zip(segments, out.cache.layers, out.layers, strict=True)]

    if chunk == T:
        found = read(tuple(x[0] for x in script))
    else:
        _, parts = jax.lax.scan(lambda carry, part: (carry, read(part)), (), script)
        found = [jnp.moveaxis(part, 0, 2).reshape(*part.shape[1:3], -1)[..., :T] for part in parts]
    layers = tuple(seen.replace(reread=x) for seen, x in zip(observation.layers, found, strict=True))
    return observation.replace(layers=layers)


def _script(how: Reread, T: int, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is read for each of the M chunks: i32[M, n] fixed ids or -1, i32[M, n] tokens of the prompt, i32[M]."""
    first, later, answer = how.instruction
    fixed, at = [], []
    starts = np.arange(0, T, chunk)
    for start in starts:
        quoted = range(max(start - how.overlap, 0), start) if later else ()
        told = (later if start else first, quoted, answer, range(start, start + chunk))
        ids = [x for index, part in enumerate(told) for x in (part if index % 2 == 0 else [-1] * len(part))]
        places = [x for index, part in enumerate(told) for x in (part if index % 2 else [0] * len(part))]
        fixed.append(ids)
        at.append(places)
    longest = max(map(len, fixed))
    pad = lambda rows, fill: jnp.int32([row + [fill] * (longest - len(row)) for row in rows])
    return pad(fixed, -1), pad(at, T), jnp.int32(starts)  # token T is there in no row


@jax.jit
def _with_new_tail(layer: LayerCache) -> LayerCache:
    """The layer with an empty segment behind it: what is appended changes nothing of what it held."""
    return layer.replace(segments=(*layer.segments, layer.segments[-1].no_slots()))


@functools.partial(jax.jit, static_argnames=("chunk", "sinks", "whole"))
def _largest(
    segment: Segment,
    after: LayerCache,
    seen: LayerObservation,
    start: jax.Array,
    *,
    chunk: int,
    sinks: int,
    whole: bool,
) -> jax.Array:
    """f32[B, K, chunk]: of the slots from `start` on, the largest probability over queries and their group."""
    how = dict(window=seen.window, scale=seen.scale)
    B, K = segment.pos.shape[:2]
    if whole:  # the softmax of the call itself
        slots, lse = segment, seen.lse
    else:
        at = lambda x, size: segment.window(jnp.full((B, K), x), size)
        slots, head = at(start, chunk), at(0, sinks)
        parts = [slots, after.segments[-1], head.drop(head.pos >= start)]
        lse = combine([sharding.attend(part, seen.queries, **how) for part in parts if part.pos.shape[2]]).lse
    largest = sharding.mass(slots, seen.queries, lse, reduce="max", **how)
    return jnp.max(largest.reshape(B, K, -1, chunk), axis=2)
