"""Reads the mean of the keys apart, so that codes need not span what all keys have."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Observation
from kvjax.segments import LatentSegment
from kvjax.segments.bases import Offset
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule
from pallas_kernels.logits import SoftCap

_log = logging.getLogger(__name__)


def center_keys() -> CacheTransform:
    """Stores rotated keys less their mean over the row's prompt, `k - m`, and adds `<q, m>` to the logits.

    Exact by itself. Codes that follow span what keys differ in: a channel that is near 300 in every key, as biases make
    it, has the step of its variation, not one that a 16-bit zero can resolve there. That helps channels that RoPE turns
    slowly. Where logits are capped a sum of two parts cannot be: keys stay as they are, and a line in the log says so.

    Bytes: `4 * B * K * H` a layer.
    """

    @jax.jit
    def center(layer: LayerCache, seen: LayerObservation) -> LayerCache:
        if isinstance(seen.scale, SoftCap):
            _log.warning("center_keys leaves keys as they are: this layer's logits are capped.")
            return layer
        basis = Offset(_mean_key(layer))
        return layer.map_dense(*2 * (lambda slots: LatentSegment.of(slots, basis, None),))

    def init(cache: Cache, observation: Observation):
        return (cache, ()) if observation.phase == "begin" else (cache.map_layers(center, observation.layers), ())

    order = Order.of(needs="numbers channels rotated places own heads", loses="vectors slots whole")
    return CacheTransform(init, schedule=Schedule(acts_in=(), name="center_keys", order=order, on_ring=center))


def _mean_key(layer: LayerCache) -> jax.Array:
    """f32[B, K, H]: of the occupied slots of each row and head."""
    total, count = 0.0, 0
    for slots in (segment.dense() for segment in layer.segments):
        there = (slots.pos >= 0)[..., None]
        total += jnp.sum(jnp.where(there, slots.k.astype(jnp.float32), 0.0), axis=2)
        count += jnp.sum(there, axis=2)
    return total / jnp.maximum(count, 1)
