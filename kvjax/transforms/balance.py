"""Scales and orders channels so that outliers do not decide the quantization of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Needs, Observation
from kvjax.segments import LatentSegment
from kvjax.segments.bases import Channels, Scales
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule


def balance_channels(where: Literal["tail", "written"] = "tail") -> CacheTransform:
    """Stores keys as `k b` and reads them with `q / b`: exact by itself, and kinder to keys quantized per token.

    With the largest magnitudes over the prompt, of the rotated queries of a group and of the keys of its KV head:
    `b_c = sqrt(max_t |q_c| / max_t |k_c|)`, 1 where either is 0. Logits do not change. Keys quantized per channel
    have scales of their own and gain nothing.

    Args:
      where: the "tail", and with it all tokens that follow; or what is "written", the segments before it, as
        `split_slots` makes them.

    Raises:
      ValueError: `where` is neither.

    Source: Yang et al., MiKV (2024), section 3.3.
    """
    if where not in ("tail", "written"):
        raise ValueError(f"where must be 'tail' or 'written', got {where!r}.")

    @jax.jit
    def compress(layer: LayerCache, seen: LayerObservation) -> LayerCache:
        scales = _balance(layer, seen)
        basis = lambda dense: LatentSegment.of(dense.with_slots(stats={}), scales, None)
        *written, tail = layer.segments
        if where == "tail":
            return layer.with_tail(tail.map_dense(basis, basis))
        return layer.replace(segments=(*(segment.map_dense(basis, basis) for segment in written), tail))

    def init(cache: Cache, observation: Observation):
        return cache.map_layers(compress, observation.layers), ()

    needs = "vectors slots room places" if where == "tail" else "tiers numbers places"
    order = Order.of(needs, loses="vectors slots whole channels")
    schedule = Schedule(acts_in=(), needs=Needs(moments_from=(0,)), name="balance_channels", order=order)
    return CacheTransform(init=init, schedule=schedule)


def smooth_channels(power: float = 0.5) -> CacheTransform:
    """Stores rotated keys as `k / lambda` and reads them with `q lambda`, the same for both channels of a RoPE pair.

    `lambda_c = max(max_t |k_c|, max_t |k_c'|) ** power` over the row's prompt, 1 where that is 0, with c' = c +- H / 2.
    Exact by itself. Being equal within a pair it could be moved before RoPE, into the projections.

    Bytes: `4 * B * K * H` a layer.

    Args:
      power: of the largest magnitudes, the paper's alpha, above 0.

    Raises:
      ValueError: power is not above 0.

    Source: Lin et al., QServe (2024), arXiv:2405.04532, section 4.2.
    """
    if not power > 0:
        raise ValueError(f"power must be above 0, got {power}.")

    def scales(layer: LayerCache) -> tuple[Scales, None]:
        peak = _peaks(layer, lambda slots: slots.k)
        peak = jnp.maximum(peak, jnp.roll(peak, peak.shape[2] // 2, axis=2))
        return Scales(jnp.where(peak > 0, peak, 1.0) ** -power), None

    return _in_bases("smooth_channels", scales)


def separate_values() -> CacheTransform:
    """Stores values as `v / c` with `c = sqrt(max_t |v_c|)` over the row's prompt, 1 where that is 0; exact by itself.

    Codes with a scale for each token then lose less of small channels. Bytes: `4 * B * K * H` a layer.

    Source: He et al., ZipCache (2024), arXiv:2405.14256, section 4.1.
    """

    def scales(layer: LayerCache) -> tuple[None, Scales]:
        peak = _peaks(layer, lambda slots: slots.values_apart("separate_values"))
        return None, Scales(jnp.where(peak > 0, peak, 1.0) ** -0.5)

    return _in_bases("separate_values", scales)


def order_channels() -> CacheTransform:
    """Stores the channels of keys in the order of their range over the row's prompt, the widest first.

    Exact by itself: codes that follow may treat the first channels apart. Of equal ranges the first channel comes
    first. Bytes: `4 * B * K * H` a layer.
    """

    def order(layer: LayerCache) -> tuple[Channels, None]:
        most = _peaks(layer, lambda slots: slots.k, lambda k: k)
        least = _peaks(layer, lambda slots: slots.k, lambda k: -k)
        H = most.shape[2]
        return Channels(jax.lax.top_k(most + least, H)[1], H), None

    return _in_bases("order_channels", order)


def _in_bases(name: str, bases: Callable[[LayerCache], tuple]) -> CacheTransform:
    """Stores all segments of a layer in bases that its prompt decides."""

    @jax.jit
    def compress(layer: LayerCache) -> LayerCache:
        of = bases(layer)
        return layer.map_dense(*2 * (lambda slots: LatentSegment.of(slots, *of),))

    def init(cache: Cache, observation: Observation):
        return (cache, ()) if observation.phase == "begin" else (cache.map_layers(compress), ())

    order = Order.of(needs="numbers channels rotated places own heads", loses="vectors slots whole channels")
    on_ring = lambda layer, seen: compress(layer)
    return CacheTransform(init, schedule=Schedule(acts_in=(), name=name, order=order, on_ring=on_ring))


def _peaks(layer: LayerCache, of: Callable, size: Callable = jnp.abs) -> jax.Array:
    """f32[B, K, H]: the largest `size` of a channel over occupied slots; 0 where there are none."""
    found = []
    for slots in (segment.dense() for segment in layer.segments):
        there = (slots.pos >= 0)[..., None]
        found.append(jnp.max(jnp.where(there, size(of(slots).astype(jnp.float32)), -jnp.inf), axis=2, initial=-jnp.inf))
    if any(peak.shape != found[-1].shape for peak in found):
        raise ValueError("scales of channels need slots that each row has of its own, got some that rows share.")
    peak = jnp.max(jnp.stack(found), axis=0)
    return jnp.where(peak > -jnp.inf, peak, 0.0)


def _balance(layer: LayerCache, seen: LayerObservation) -> Scales:
    of_keys = _peaks(layer, lambda slots: slots.k)  # [B, K, H]
    B, K, H = of_keys.shape
    of_queries = jnp.max(seen.moments[0].peak.reshape(B, K, -1, H), axis=2)
    usable = (of_keys > 0) & (of_queries > 0)
    ratio = jnp.where(usable, of_queries, 1.0) / jnp.where(usable, of_keys, 1.0)
    return Scales(jnp.sqrt(ratio))
