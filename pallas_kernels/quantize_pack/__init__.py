"""Min/max quantization and bit packing along the slot axis."""

from pallas_kernels.quantize_pack.api import Axis, Packed, quantize_pack
from pallas_kernels.words import WORD_BITS, words_in_row

__all__ = ["WORD_BITS", "Axis", "Packed", "quantize_pack", "words_in_row"]
