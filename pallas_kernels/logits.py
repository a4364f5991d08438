"""From dot products to logits: a factor, and for some models a soft cap."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SoftCap(NamedTuple):
    """Logits that saturate: `logit = cap * tanh(scale * <q, k> / cap)`. Source: Gemma 2 (2024), section 2."""

    scale: float
    cap: float


Scale = float | SoftCap
"""What an op takes as `scale`: a factor, or a factor with a cap. Where it may be None that is `H ** -0.5`."""


def factor(scale: Scale | None, head_dim: int) -> float:
    """What dot products are multiplied by."""
    if scale is None:
        return head_dim**-0.5
    return scale.scale if isinstance(scale, SoftCap) else scale


def capped(logits: jax.Array, scale: Scale | None) -> jax.Array:
    """Logits from dot products that were multiplied by `factor`."""
    return scale.cap * jnp.tanh(logits / scale.cap) if isinstance(scale, SoftCap) else logits
