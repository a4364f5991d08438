"""KVCOMM: a text's cache in a new context, corrected by what such contexts did to other texts.

Ye et al. "KVCOMM: Online Cross-context KV-cache Communication for Efficient LLM-based Multi-agent Systems". 2025.
arXiv:2510.12872.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache import Cache


class Anchor(NamedTuple):
    """A text that was read both alone and in its context, at the same positions."""

    alone: Cache  # read alone and moved to where it is
    context: Cache  # the same tokens, read in context and `detached`


def reusable(alone: Cache, anchors: Sequence[Anchor], *, gamma: float = 0.3) -> bool:
    """Tells whether anchors are enough to correct a text: whether some are much nearer to it than others.

    Over the A anchors that are at least as long, weights are `softmax(-||x - x_a||)` of keys and values of all layers;
    with entropy above `gamma log A`, or fewer than 2 anchors, the text should be read in its context, and become one.

    Args:
      alone: the text, read alone and moved to where it is, in dense segments of one row.
      anchors: of other texts in this context.
      gamma: threshold.
    """
    near = _long_enough(alone, anchors)
    if len(near) < 2:
        return False
    distances = jnp.stack([_distance(alone, anchor.alone) for anchor in near])
    weights = jax.nn.softmax(-distances)
    entropy = -jnp.sum(weights * jnp.log(jnp.maximum(weights, 1e-30)))
    return bool(entropy <= gamma * math.log(len(near)))


def corrected(alone: Cache, anchors: Sequence[Anchor]) -> Cache:
    """Adds to keys and values what the context did to those of anchors: `x + sum_a w_a (context_a - alone_a)`.

    Weights of every token are `softmax_a(-mean |x - x_a|)` over layers, heads and channels, of keys and of values
    apart. Keys are rotated ones. The first layer does not depend on the context and stays.

    Deviations: the text itself alone, by tokens; the paper also corrects the fixed text behind it, by channels. Which
    anchors are kept (at most 20 a text, the least used of the oldest go) is the caller's.

    Args:
      alone: the text, read alone and moved to where it is, in dense segments of one row.
      anchors: `reusable` ones; shorter ones are left out.

    Raises:
      ValueError: no anchor is as long as the text, or layers are not one dense segment.
    """
    near = _long_enough(alone, anchors)
    if not near:
        raise ValueError("anchors must have at least one that is as long as the text.")
    T = int(_tokens(alone))
    weights = {}
    for field in ("k", "v"):
        away = [
            jnp.mean(jnp.stack([jnp.abs(x - y) for x, y in zip(_each(alone, field, T), _each(a.alone, field, T))]), 0)
            for a in near
        ]
        weights[field] = jax.nn.softmax(-jnp.mean(jnp.stack(away), axis=(2, 4)), axis=0)  # [A, B, T]
    layers = [alone.layers[0]]
    for index in range(1, len(alone.layers)):
        segment = _ordered(alone, index)
        changed = {}
        for field in ("k", "v"):
            deltas = jnp.stack(
                [_part(a.context, index, field, T) - _part(a.alone, index, field, T) for a in near]
            )  # [A, B, K, T, H]
            x = getattr(segment, field)
            delta = jnp.einsum("abt,abkth->bkth", weights[field], deltas)
            changed[field] = x.at[:, :, :T].add(delta.astype(x.dtype))
        layers.append(alone.layers[index].with_tail(segment.replace(**changed)))
    return alone.replace(layers=tuple(layers))


def _ordered(cache: Cache, index: int):
    segments = cache.layers[index].segments
    if len(segments) != 1 or not getattr(segments[0], "is_plain", False):
        raise ValueError("kvcomm needs layers of one dense segment.")
    return segments[0].in_token_order()


def _part(cache: Cache, index: int, field: str, tokens: int) -> jax.Array:
    """f32[B, K, T, H]: keys or values of the first tokens."""
    return getattr(_ordered(cache, index), field)[:, :, :tokens].astype(jnp.float32)


def _each(cache: Cache, field: str, tokens: int) -> list[jax.Array]:
    return [_part(cache, index, field, tokens) for index in range(len(cache.layers))]


def _tokens(cache: Cache) -> jax.Array:
    return jnp.max(jnp.sum(cache.layers[0].segments[-1].pos >= 0, axis=-1))


def _long_enough(alone: Cache, anchors: Sequence[Anchor]) -> list[Anchor]:
    return [anchor for anchor in anchors if int(_tokens(anchor.alone)) >= int(_tokens(alone))]


def _distance(a: Cache, b: Cache) -> jax.Array:
    T = int(_tokens(a))
    squares = [jnp.sum(jnp.square(x - y)) for f in ("k", "v") for x, y in zip(_each(a, f, T), _each(b, f, T))]
    return jnp.sqrt(sum(squares))
