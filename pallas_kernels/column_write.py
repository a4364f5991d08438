"""Writes one slot of every head in place, where slots lie along lanes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import result_like
from pallas_kernels.tpu_tiles import LANES, slots_minor


def is_column(x: jax.Array, new: jax.Array) -> bool:
    """Whether a slot of `[B, K, S, H]` is a column of tiles, and `write_columns` takes it."""
    return new.shape[2] == 1 and x.shape[2] >= LANES and slots_minor(x) and jnp.issubdtype(x.dtype, jnp.floating)


@jax.jit
def write_columns(x: jax.Array, new: jax.Array, start: jax.Array, on: jax.Array) -> jax.Array:
    """`x` with slot `start[b, k]` of every head replaced where `on[b, k]`; on TPU only.

    A step of the grid reads and writes the 128 slots around one, and the result takes the memory of `x` where that is
    not read again. XLA would lay out a buffer that is written at a dynamic index with that axis outermost, and copy
    all of it there and back for kernels that read slots as lanes.

    Args:
      x: [B, K, S, H] of floating point, which XLA:TPU lays out with S minor: H fills lanes less well.
      new: [B, K, 1, H].
      start: i32[B, K].
      on: bool[B, K].
    """
    B, K, _, H = x.shape
    columns = x.swapaxes(2, 3)
    around = lambda b, k, start, on: (b, k, 0, jax.lax.div(start[b, k], jnp.int32(LANES)))
    tile = pl.BlockSpec((1, 1, H, LANES), around)
    column = pl.BlockSpec((1, 1, H, 1), lambda b, k, start, on: (b, k, 0, 0))
    # float32 holds all that a cache is stored in, and broadcasts along lanes.
    arrays = start, on.astype(jnp.int32), new.swapaxes(2, 3).astype(jnp.float32), columns
    written = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(B, K), in_specs=[column, tile], out_specs=tile
        ),
        out_shape=result_like(columns.shape, x.dtype, *arrays),
        input_output_aliases={3: 0},
        name="write_columns",
    )(*arrays)
    return written.swapaxes(2, 3)


def _kernel(start_ref, on_ref, new_ref, x_ref, out_ref):
    """start_ref, on_ref i32[B, K]; new_ref f32[1, 1, H, 1]; x_ref, out_ref [1, 1, H, 128]."""
    b, k = pl.program_id(0), pl.program_id(1)
    x = x_ref[0, 0].astype(jnp.float32)
    at = jax.lax.rem(start_ref[b, k], jnp.int32(LANES))
    here = (jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == at) & (on_ref[b, k] != 0)
    out_ref[0, 0] = jnp.where(here, new_ref[0, 0], x).astype(out_ref.dtype)
