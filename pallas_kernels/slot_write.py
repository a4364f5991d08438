"""Writes one slot of every head in place, where XLA would lay out the buffer anew to do so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import result_like
from pallas_kernels.tpu_tiles import LANES, SUBLANES, slots_minor

_ROWS = 4 * SUBLANES  # a tile of 8-bit numbers


def takes_slot(x: jax.Array, new: jax.Array) -> bool:
    """Whether `write_slot` takes `[B, K, S, H]`: slots are columns of tiles, or rows whose last tile is not full."""
    if new.shape[2] != 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    S, H = x.shape[2:]
    return S >= LANES if slots_minor(x) else S >= _ROWS and S % SUBLANES != 0 and H % LANES == 0


@jax.jit
def write_slot(x: jax.Array, new: jax.Array, start: jax.Array, on: jax.Array) -> jax.Array:
    """`x` with slot `start[b, k]` of every head replaced where `on[b, k]`; on TPU only.

    A step of the grid reads and writes the tiles around one slot, and the result takes the memory of `x` where that is
    not read again. XLA would lay out a buffer that is written at a dynamic index with that axis outermost, and copy
    all of it there and back for kernels that read slots next to channels.

    Args:
      x: [B, K, S, H] of floating point; see `takes_slot`.
      new: [B, K, 1, H].
      start: i32[B, K].
      on: bool[B, K].
    """
    B, K, _, H = x.shape
    columns = slots_minor(x)
    lying = (lambda x: x.swapaxes(2, 3)) if columns else (lambda x: x)
    size = LANES if columns else _ROWS
    shape = lambda slots: (1, 1, H, slots) if columns else (1, 1, slots, H)

    def around(b, k, start, on):
        at = jax.lax.div(start[b, k], jnp.int32(size))
        return (b, k, 0, at) if columns else (b, k, at, 0)

    tile = pl.BlockSpec(shape(size), around)
    slot = pl.BlockSpec(shape(1), lambda b, k, start, on: (b, k, 0, 0))
    # float32 holds all that a cache is stored in, and broadcasts along lanes.
    arrays = start, on.astype(jnp.int32), lying(new).astype(jnp.float32), lying(x)
    written = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(B, K), in_specs=[slot, tile], out_specs=tile
        ),
        out_shape=result_like(arrays[3].shape, x.dtype, *arrays),
        input_output_aliases={3: 0},
        name="write_slot",
    )(*arrays)
    return lying(written)


def _kernel(start_ref, on_ref, new_ref, x_ref, out_ref):
    """start_ref, on_ref i32[B, K]; of columns new_ref f32[1, 1, H, 1], x_ref and out_ref [1, 1, H, 128]."""
    b, k = pl.program_id(0), pl.program_id(1)
    x, new = x_ref[0, 0].astype(jnp.float32), new_ref[0, 0]
    axis = 1 if new.shape[1] == 1 else 0
    at = jax.lax.rem(start_ref[b, k], jnp.int32(x.shape[axis]))
    here = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) == at) & (on_ref[b, k] != 0)
    out_ref[0, 0] = jnp.where(here, new, x).astype(out_ref.dtype)
