"""`lowrank_decode_attention`: the name by which callers still ask for `decode_attention` with a rotation."""

from __future__ import annotations

import jax

from pallas_kernels.decode_attention import Rotation, decode_attention
from pallas_kernels.partial import Partial


def lowrank_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    basis: jax.Array | None,
    inv_freq: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    mean: jax.Array | None = None,
    at: jax.Array | None = None,
    **how,
) -> Partial:
    """`decode_attention` with `Rotation(inv_freq, at, basis, mean)`."""
    return decode_attention(q, k, v, q_pos, k_pos, rotation=Rotation(inv_freq, at, basis, mean), **how)
