"""Min/max quantization and bit packing along the slot axis."""

from pallas_kernels.quantize_pack.api import Packed, dequantize, quantize_pack

__all__ = ["Packed", "dequantize", "quantize_pack"]
