"""Scales key channels so that their outliers do not decide the quantization of the others."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Needs, Observation
from kvjax.segments import LatentSegment
from kvjax.segments.bases import Scales
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


def _balance(layer: LayerCache, seen: LayerObservation) -> Scales:
    peaks = []
    for segment in layer.segments:
        dense = segment.dense()
        k = jnp.where((dense.pos >= 0)[..., None], jnp.abs(dense.k.astype(jnp.float32)), 0.0)
        peaks.append(jnp.max(k, axis=2, initial=0.0))
    if any(peak.shape != peaks[-1].shape for peak in peaks):
        raise ValueError("balance_channels needs slots that each row has of its own, got some that rows share.")
    of_keys = jnp.max(jnp.stack(peaks), axis=0)  # [B, K, H]
    B, K, H = of_keys.shape
    of_queries = jnp.max(seen.moments[0].peak.reshape(B, K, -1, H), axis=2)
    usable = (of_keys > 0) & (of_queries > 0)
    ratio = jnp.where(usable, of_queries, 1.0) / jnp.where(usable, of_keys, 1.0)
    return Scales(jnp.sqrt(ratio))
