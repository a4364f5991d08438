"""Rows in which the words of two runs of slots lie side by side, as they do where heads have 64 channels.

Such a row holds the words of slots `0 .. per - 1` in its first half and those of `per .. 2 per - 1` in its second.
Codes are left where they are: what multiplies them is parted by halves of the lanes, and what is counted by slots is
brought into their order, all first halves before all second ones, or back. The matrix unit does that, as a product with
zeros and ones; moving lanes takes several times as long.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.tpu_decode import product
from pallas_kernels.tpu_tiles import LANES

BLOCK = 2 * LANES  # slots that are brought into another order among themselves


def halves(x: jax.Array, per: int, dtype) -> tuple[jax.Array, jax.Array]:
    """f32[R, s] of slots in order, rounded to dtype -> f32[R, s / 2] of first halves, and of second ones."""
    found = _moved(x.astype(dtype), _order(per, 0, dtype))
    return tuple(jnp.concatenate([y[:, i : i + LANES] for y in found], axis=1) for i in (0, LANES))


def in_order(first: jax.Array, second: jax.Array, per: int, dtype) -> jax.Array:
    """f32[R, s] of what `halves` parts, exact in float32 and to 2**-16 in bfloat16."""
    x = jnp.concatenate(
        [part[:, i : i + LANES] for i in range(0, first.shape[1], LANES) for part in (first, second)], axis=1
    )
    order = _order(per, 1, dtype)
    upper = x.astype(dtype)
    found = _moved(upper, order)
    if dtype != jnp.float32:
        lower = _moved((x - upper.astype(jnp.float32)).astype(dtype), order)
        found = [a + b for a, b in zip(found, lower)]
    return jnp.concatenate(found, axis=1)


def of_half(x: jax.Array, half: int) -> jax.Array:
    """[R, 64] in one half of the lanes, zeros in the other."""
    other = jnp.zeros_like(x)
    return jnp.concatenate([other, x] if half else [x, other], axis=1)


def _order(per: int, axis: int, dtype) -> jax.Array:
    """[256, 256] with a one for every slot, counted in order along an axis and by halves along the other."""
    shape = BLOCK, BLOCK
    slot, place = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (axis, 1 - axis))
    rest = jax.lax.rem(place, LANES)
    of_place = (jax.lax.div(rest, per) * 2 + jax.lax.div(place, LANES)) * per + jax.lax.rem(rest, per)
    return (slot == of_place).astype(jnp.float32).astype(dtype)


def _moved(x: jax.Array, order: jax.Array) -> list[jax.Array]:
    """Blocks f32[R, 256] of [R, s] times a matrix, all of them in one product."""
    rows = x.shape[0]
    blocks = [x[:, i : i + BLOCK] for i in range(0, x.shape[1], BLOCK)]
    found = product(jnp.concatenate(blocks, axis=0), order)
    return [found[i * rows : (i + 1) * rows] for i in range(len(blocks))]
