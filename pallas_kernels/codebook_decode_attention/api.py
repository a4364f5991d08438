"""`codebook_decode_attention`: the name by which callers still ask for `decode_attention` over codes of centroids."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.partial import Partial
from pallas_kernels.product_quantize import Codes


def codebook_decode_attention(
    q: jax.Array, k: Codes, v: Codes, q_pos: jax.Array, k_pos: jax.Array, **how
) -> Partial:
    """`decode_attention`; the codes carry their codebooks.

    Source: Wang et al., MILLION (2025), arXiv:2504.03661.
    """
    return decode_attention(q, k, v, q_pos, k_pos, **how)
