"""Pairs of layers share the directions of their keys and values; each keeps the lengths."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.budget import Budget, budget_rows, budget_slots
from kvjax.cache import Cache, LayerCache
from kvjax.observation import Observation
from kvjax.segments import ScaledView, Segment
from kvjax.segments.segment import dense_tail
from kvjax.segments.slots import keep_highest, marked, priority
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule

_NEARLY_PARALLEL = 1e-3  # sine below which the arc is a chord
_ROUNDING = 1e-5  # radians, and of a scaled angle: what float32 cannot tell apart does not decide


def merge_layers(start: int | float, retain: Budget, *, interpolation: float = 0.5) -> CacheTransform:
    """Merges layers `start` and `start + 1`, the next two, and so on; a last layer without a partner stays.

    For each token and KV head, keys and values apart, the shared direction lies on the arc between the two layers':

        e = (sin((1 - t) angle) x_1 / |x_1| + sin(t angle) x_2 / |x_2|) / sin(angle),    t = interpolation

    and layer i reads `|x_i| e`. The tokens whose directions differ most are not merged: they stay exact in the last
    segment of either layer, where tokens that follow the prompt go as well. A token's difference is the larger of
    the angles of its keys and of its values, each scaled to [0, 1] over the tokens of the row and head; of a tie, such
    as between the token of the largest key angle and that of the largest value angle, the oldest stays. Rotations keep
    angles and lengths, so it does not matter that keys are rotated.

    Args:
      start: first layer that is merged: its index, or a fraction of the number of layers.
      retain: tokens per KV head that stay exact: a count, or a fraction of each row's prompt; 0 for none.
      interpolation: how far the shared direction is from the first layer's towards the second's.

    Raises:
      ValueError: a setting outside its range (at build), or no two layers from `start` on (at `init`).
    """
    if start < 0 or (isinstance(start, float) and start >= 1):
        raise ValueError(f"start must be a layer's index or a fraction in [0, 1), got {start}.")
    if retain < 0 or (isinstance(retain, float) and retain > 1):
        raise ValueError(f"retain must be a count of tokens or a fraction in [0, 1], got {retain}.")
    if not 0 <= interpolation <= 1:
        raise ValueError(f"interpolation must be in [0, 1], got {interpolation}.")

    @jax.jit
    def compress(first: LayerCache, second: LayerCache, rows: jax.Array):
        a, b = (dense_tail(layer, "merge_layers").with_slots(stats={}) for layer in (first, second))
        S = a.pos.shape[2]
        there = a.pos >= 0
        k, k_a, k_b, key_angle = _merged(a.k, b.k, interpolation)
        v, v_a, v_b, value_angle = _merged(*(x.values_apart("merge_layers") for x in (a, b)), interpolation)
        apart = jnp.maximum(_scaled_to_one(key_angle, there), _scaled_to_one(value_angle, there))
        retained = min(budget_slots(retain, S), S) if retain else 0
        exact = keep_highest(priority(apart, a.pos), a.pos, retained, rows)
        lengths = {"k_a": k_a, "k_b": k_b, "v_a": v_a, "v_b": v_b}  # gathered with the slots
        merged = Segment.of(k, v, a.pos, stats=lengths).drop(marked(*exact, S)).in_token_order()
        merged = merged.first(S - retained)
        direction = merged.with_slots(stats={}).astype(a.k.dtype)
        scales = [(merged.stats["k_" + x], merged.stats["v_" + x]) for x in "ab"]
        return direction, scales, [x.take(*exact) for x in (a, b)]

    def init(cache: Cache, observation: Observation):
        L = len(cache.layers)
        first = int(start * L) if isinstance(start, float) else start
        if first + 1 >= L:
            raise ValueError(f"start must leave two layers to merge, got {start} of {L} layers.")
        rows = budget_rows(retain, observation.prompt, observation.prompt_slots) if retain else 0 * observation.prompt
        layers, shared = list(cache.layers), dict(cache.shared)
        for i in range(first, L - 1, 2):
            name = f"layers {i} and {i + 1}"
            shared[name], scales, tails = compress(layers[i], layers[i + 1], rows)
            for j, (of_layer, tail) in enumerate(zip(scales, tails)):
                view = ScaledView(*of_layer, name)
                layers[i + j] = layers[i + j].replace(segments=(*layers[i + j].segments[:-1], view, tail))
        return cache.replace(layers=tuple(layers), shared=shared), ()

    order = Order.of(needs="whole vectors", loses="whole vectors slots channels own")
    schedule = Schedule(acts_in=(), name="merge_layers", order=order)
    return CacheTransform(init=init, schedule=schedule)


def _merged(x: jax.Array, y: jax.Array, interpolation: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The direction between two [B, K, S, H], both lengths and the angle [B, K, S] in radians; float32."""
    (x_unit, x_length), (y_unit, y_length) = _polar(x), _polar(y)
    # Twice the half angle: the arc cosine knows angles below 1e-3 only to their size.
    angle = 2 * jnp.arctan2(_length(x_unit - y_unit), _length(x_unit + y_unit))[..., None]
    chord = jnp.sin(angle) < _NEARLY_PARALLEL
    sine = jnp.where(chord, 1.0, jnp.sin(angle))
    of_x = jnp.where(chord, 1 - interpolation, jnp.sin((1 - interpolation) * angle) / sine)
    of_y = jnp.where(chord, interpolation, jnp.sin(interpolation * angle) / sine)
    direction, _ = _polar(of_x * x_unit + of_y * y_unit)
    return direction, x_length, y_length, angle[..., 0]


def _polar(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Directions and lengths of [..., H], float32; zero has no direction."""
    x = x.astype(jnp.float32)
    length = _length(x)
    return x / jnp.where(length > 0, length, 1.0)[..., None], length


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def _scaled_to_one(x: jax.Array, there: jax.Array) -> jax.Array:
    """[B, K, S] with the least of a row and head at 0 and the largest at 1."""
    low = jnp.min(jnp.where(there, x, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(there, x, -jnp.inf), axis=-1, keepdims=True)
    differ = high > low + _ROUNDING
    scaled = jnp.where(differ, (x - low) / jnp.where(differ, high - low, 1.0), 0.0)
    return jnp.where(scaled > 1 - _ROUNDING, 1.0, scaled)
