"""Caches and observations made of arrays, for transforms that need no decoder."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import Cache, LayerCache, Queries, Rope, Segment
from kvjax.observation import LayerObservation, Observation

K, H, T = 2, 4, 20
ROPE = Rope.from_base(100.0, H)


def slots_cache(k, lengths, v=None, layers=1, order=None):
    """Layers of the same slots; token t of a row lies in slot t, or where i32[B, K, T] `order` puts it."""
    pos = np.broadcast_to(np.arange(k.shape[2]), k.shape[:3])
    pos = np.where(pos < np.array(lengths)[:, None, None], pos, -1)
    slots = Segment.of(*map(jnp.asarray, (np.float32(k), np.float32(k if v is None else v), np.int32(pos))))
    if order is not None:
        slots = jax.tree.map(lambda x: jnp.take_along_axis(x, order[(...,) + (None,) * (x.ndim - 3)], axis=2), slots)
    return Cache(tuple(LayerCache((slots,)) for _ in range(layers)), length=jnp.int32(lengths))


def seen_of(lengths, prompt_slots=T, layers=1, learned=None, **more):
    """What a decoder reports whose queries nobody asked for."""
    B = len(lengths)
    nothing = Queries(jnp.zeros((B, 0, K, H)), jnp.zeros((B, 0), jnp.int32), ROPE)
    layer = LayerObservation(nothing, jnp.zeros((B, 0, K)), layer=jnp.int32(0), learned=learned)
    prompt = jnp.int32(lengths)
    return Observation((layer,) * layers, new=prompt, prompt=prompt, prompt_slots=prompt_slots, **more)
