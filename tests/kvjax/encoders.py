"""Codes of whole segments, as transforms make them."""

import math

from kvjax.codecs import Affine, Corrected, Product


def affine(slots, *, bits, key_group, value_group, key_axis="channel", block=None, value_bits=None, **how):
    """Affine codes, keys in groups over tokens or channels, values in groups over channels."""
    fewest = math.lcm(key_group if key_axis == "channel" else 1, 32 // min(bits, value_bits or bits))
    how["block"] = block or fewest
    key = Affine.of_blocks(bits, key_group, key_axis, **how)
    value = Affine.of_blocks(value_bits or bits, value_group, "token", **how)
    return slots.with_slots(stats={}).encoded(key, value)


def corrected(slots, codes, *, block, rank, loops=3, outliers=0.0, dtype="bfloat16"):
    """The codes `(of the keys, of the values)` with outliers and a low-rank part."""
    key, value = (
        Corrected(of, None, None, axis, block, rank, loops, outliers, dtype)
        for of, axis in zip(codes, ("channel", "token"))
    )
    return slots.encoded(key, value)


def products(slots, key_codebook, value_codebook):
    """Codes of centroids."""
    return slots.encoded(Product.of(key_codebook), Product.of(value_codebook))
