"""Stores slots as codes of calibrated centroids, with an exact tail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax

from kvjax.cache import Cache, LayerCache
from kvjax.codecs import Product
from kvjax.observation import Observation
from kvjax.segments import BlockedSegment
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.schedule import Schedule
from pallas_kernels.product_quantize import code_bits, slots_of_a_word

LayerCodebooks = tuple[jax.Array, jax.Array]
"""[M, C, H / M] centroids of a layer's rotated keys, and of its values."""


def product_quantize(
    codebooks: Sequence[LayerCodebooks], *, residual: int = 128, of: Literal["vectors", "coordinates"] = "vectors"
) -> CacheTransform:
    """Turns each layer's last, dense segment into codes of centroids and a dense tail of `residual` slots.

    Segments before it, which nothing is written to any more, are encoded as a whole. The tail flushes into the codes
    by itself whenever it fills up.

    Args:
      codebooks: of each layer; rows and KV heads share them.
      residual: tokens of a block, and the most that are kept exact.
      of: what the centroids were fitted to: "vectors" of all channels, which a projection before this leaves none of,
        or the "coordinates" that a projection of rotated keys, and one of values, makes of them.

    Raises:
      ValueError: codebooks that do not pack, or a residual that does not fill words (at build); another number of
        layers or channels (at `init`).
    """
    if of not in ("vectors", "coordinates"):
        raise ValueError(f"of must be 'vectors' or 'coordinates', got {of!r}.")
    if not codebooks:
        raise ValueError("codebooks must be of at least one layer, got none.")
    word = max(slots_of_a_word(code_bits(codebook)) for codebook in codebooks[0])
    if residual < 1 or residual % word:
        raise ValueError(f"residual must be a positive multiple of {word} for codes of this size, got {residual}.")

    @jax.jit
    def compress(layer: LayerCache, codebooks: LayerCodebooks) -> LayerCache:
        def encode(slots):
            slots.values_apart("A codebook of the values")
            for name, x, codebook in zip("kv", (slots.k, slots.v), codebooks):
                if x.shape[-1] != codebook.shape[0] * codebook.shape[2]:
                    raise ValueError(
                        f"codebooks must be of the channels of {name}, {x.shape[-1]}, got {codebook.shape[0]} x "
                        f"{codebook.shape[2]}."
                    )
            return slots.with_slots(stats={}).encoded(*(Product.of(codebook) for codebook in codebooks))

        def appended(slots):
            return BlockedSegment.from_dense(slots, encode, residual) if slots.layout.grows else encode(slots)

        return layer.map_dense(encode, appended)

    def init(cache: Cache, observation: Observation):
        if len(codebooks) != len(cache.layers):
            raise ValueError(f"codebooks are of {len(codebooks)} layers, but the cache has {len(cache.layers)}.")
        return cache.map_layers(compress, codebooks), ()

    whole = "channels " if of == "vectors" else ""
    order = Order.of(needs=f"{whole}numbers rotated room own", loses="numbers vectors slots whole")
    return CacheTransform(init=init, schedule=Schedule(acts_in=(), begins=True, name="product_quantize", order=order))
