"""Vectors as codes of their nearest centroids, one for each of several sub-vectors."""

from pallas_kernels.product_quantize.api import product_quantize, reconstruct, slots_of_a_word

__all__ = ["product_quantize", "reconstruct", "slots_of_a_word"]
