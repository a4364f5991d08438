"""Vectors as codes of their nearest centroids, one for each of several sub-vectors."""

from pallas_kernels.product_quantize.api import code_bits, product_quantize, slots_of_a_word
from pallas_kernels.product_quantize.reference import Codes

__all__ = ["Codes", "code_bits", "product_quantize", "slots_of_a_word"]
