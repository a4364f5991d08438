"""Stores keys and values in another floating dtype."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.codecs import UnitNorm
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.quantize import store as store_as
from kvjax.transforms.schedule import Schedule

_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def cast(dtype: str = "float8_e4m3fn", *, scale: Literal["one", "token"] = "one") -> CacheTransform:
    """Stores dense keys and values as `dtype`, those of the prompt and all that follow.

    8-bit floats have a scale of one, unless `scale` says otherwise: what lies beyond their range (448 for e4m3fn) is
    clipped. They are widened tile by tile when read.

    Args:
      dtype: "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16" or "float32".
      scale: "one" stores numbers as they are; with "token" each slot's key and value are divided by the root of their
        mean square, which is stored in float32 beside them (8 bytes a slot): nothing is clipped, whatever its size.

    Raises:
      ValueError: another dtype, or a cache that is compressed already.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if scale not in ("one", "token"):
        raise ValueError(f"scale must be 'one' or 'token', got {scale!r}.")
    if scale == "token":
        codecs = 2 * (UnitNorm(jnp.zeros((), dtype), None),)
        return store_as("cast", None, 0, written=codecs, one_by_one=codecs)
    narrow = jnp.dtype(dtype).itemsize == 1

    def store(segment):
        if narrow and segment.key_rope != "stored":
            raise ValueError(f"cast to {dtype} needs rotated keys, got key_rope={segment.key_rope!r}.")
        return segment.astype(dtype)

    compress = jax.jit(lambda stored: stored.map_dense(store, store))  # a layer cache, or what layers share

    return CacheTransform(
        init=lambda cache, observation: (cache.map_layers(compress).map_shared(compress), ()),
        schedule=Schedule(
            acts_in=(),
            begins=True,
            name="cast",
            on_ring=lambda layer, seen: compress(layer),
            order=Order.of(needs="numbers rotated" if narrow else "numbers"),
        ),
    )
