"""CacheBlend: texts that were read apart, with the tokens read again that this changes most.

Yao et al. "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion". 2024. arXiv:2405.16444.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from kvjax.cache import Cache, LayerCache
from kvjax.drivers import Step
from kvjax.observation import Needs
from kvjax.reuse.rewriting import rewritten
from kvjax.segments.slots import highest_first, priority, without_rounding


class Blended(NamedTuple):
    """Texts that were read apart, blended."""

    cache: Cache
    positions: Int32[Array, "B n"]  # of the tokens that were read again, in order
    staleness: Float32[Array, "B T"]


def staleness(fresh: LayerCache, held: LayerCache, tokens: int) -> jax.Array:
    """Measures how far values of a layer are from what they should be: f32[B, T], `sum (v - v_held)^2` of every token.

    Args:
      fresh: the layer with all tokens read together.
      held: what was read apart; a token that it lacks has values of 0.
      tokens: [T]; token t has position t.
    """
    difference = _values(fresh, tokens) - _values(held, tokens)
    return jnp.sum(jnp.square(difference), axis=(1, 3))


def cacheblend(
    step: Step,
    first_layers: Step,
    cache: Cache,
    tokens: Int32[Array, "B T"],
    *,
    ratio: float = 0.16,
    room: int | None = None,
) -> Blended:
    """Reads those tokens again whose values at the check layer differ most from what reading all together gives.

    The first layers are run on all tokens, and keep their keys and values; `floor(ratio * T)` tokens are chosen by
    `staleness` at the last of them, and the other layers compute these alone. 1 is a prefill; 0 keeps what was read
    apart in all but the first layers. A question follows by `kvjax.before`.

    Deviations: tokens are chosen once, as in the code, not in ever smaller sets layer by layer.

    Args:
      step: the decoder.
      first_layers: its first layers, 2 in the paper: `models.decoder.first_layers`.
      cache: texts that were read apart, at positions 0 to T - 1 (`joined`, `moved`).
      tokens: i32[B, T].
      ratio: of the tokens, 0 to 1.
      room: see `rewritten`.

    Raises:
      ValueError: ratio is outside of 0 to 1; layers share slots.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be from 0 to 1, got {ratio}.")
    if cache.shared:
        raise ValueError(f"cacheblend needs layers with slots of their own, got shared {sorted(cache.shared)}.")
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    fresh = first_layers(tokens, positions, first_layers.empty_cache(B), needs=Needs(), last_only=True).cache.layers
    check = len(fresh) - 1
    stale = staleness(fresh[check], cache.layers[check], T)
    order = highest_first(priority(without_rounding(stale), positions), positions)
    chosen = jnp.sort(order[:, : int(ratio * T + 1e-6)], axis=1).astype(jnp.int32)
    mixed = cache.replace(layers=(*fresh, *cache.layers[len(fresh) :]))
    if chosen.shape[1]:
        again = jnp.take_along_axis(tokens, chosen, axis=1)
        mixed = rewritten(step, mixed, again, chosen, room=room).cache
    return Blended(mixed, chosen, stale)


def _values(layer: LayerCache, tokens: int) -> jax.Array:
    """f32[B, K, T, H]: values by position."""
    total = 0.0
    for segment in layer.segments:
        v, pos = segment.dense().values.astype(jnp.float32), segment.pos
        B, K, _, H = v.shape
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
        at = jnp.where(pos >= 0, pos, tokens)
        total = total + jnp.zeros((B, K, tokens, H)).at[rows, heads, at].add(v, mode="drop")
    return total
