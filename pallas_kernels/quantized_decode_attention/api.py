"""`quantized_decode_attention`: the name by which callers still ask for `decode_attention` over packed slots."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Axis, Packed
from pallas_kernels.quantize_pack.api import told


def quantized_decode_attention(
    q: jax.Array,
    k: Packed,
    v: Packed | None,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    bits: int | None = None,
    key_axis: Axis | None = None,
    **how,
) -> Partial:
    """`decode_attention` with `bits` and `key_axis`, which must be those of the packed arrays."""
    told(k, bits=bits, axis=key_axis)
    return decode_attention(q, k, v, q_pos, k_pos, **how)
