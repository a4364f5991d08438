"""Cosines and sines of rotary embeddings inside TPU kernels, as short polynomials."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Minimax polynomials in r**2 of sqrt(2) sin(r / 2) / r and sqrt(2) cos(r / 2) for |r| <= pi (Lawson's iteration): the
# errors are below 5e-9 and 7e-8, and of the short ones 1e-4 and 1e-5.
_SINE = (7.07106764e-01, -2.94627486e-02, 3.68265510e-04, -2.18769326e-06, 7.15439326e-09)
_COSINE = (1.41421350, -1.76776358e-01, 3.68257380e-03, -3.06123460e-05, 1.27890964e-07)
_SHORT_SINE = (7.06891108e-01, -2.92864571e-02, 3.32022471e-04)
_SHORT_COSINE = (1.41420401, -1.76745556e-01, 3.66697186e-03, -2.80850269e-05)


def turns_per_token(inv_freq: jax.Array) -> jax.Array:
    """Returns i32 of `inv_freq`, f32 below pi radians: 2**-32 turns, of which a product's overflow takes whole ones."""
    scale = 2.0**32 / (2 * math.pi)
    coarse = float(round(scale / 2**18) * 2**18)  # 12 bits, so that it is exact times the upper 12 of a frequency
    bits = jax.lax.bitcast_convert_type(inv_freq.astype(jnp.float32), jnp.int32)
    upper = jax.lax.bitcast_convert_type(bits & ~0xFFF, jnp.float32)
    rest = inv_freq - upper
    parts = upper * coarse, upper * (scale - coarse), rest * coarse, rest * (scale - coarse)
    return sum(x.astype(jnp.int32) for x in parts)


def cosine_and_sine(pos: jax.Array, turns: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of positions times frequencies, for keys that are rounded to `dtype` when they are rotated.

    The library's own reduce angles of any size, which takes several times as long as all else that a kernel does. Here
    whole turns are what the product of integers has no bits for. With s = sqrt(2) sin(r / 2) and c = sqrt(2) cos(r / 2)
    of the rest r, `cos r = 1 - s**2` and `sin r = s c`.

    Args:
      pos: i32[1, s].
      turns: i32[n, 1] of `turns_per_token`.
      dtype: float32: the error is 2e-6 and 2e-9 more for every token, a tenth of what float32 angles are off by. Else
        3e-4 are added, which bfloat16 does not hold.
    """
    rest = (pos * turns).astype(jnp.float32) * (2 * math.pi / 2.0**32)
    sine, cosine = (_SINE, _COSINE) if dtype == jnp.float32 else (_SHORT_SINE, _SHORT_COSINE)
    square = rest * rest
    s, c = rest * _polynomial(sine, square), _polynomial(cosine, square)
    return 1.0 - s * s, s * c


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    total = jnp.float32(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total
