"""Slots written as columns of tiles, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.segments.slots import write_windows
from pallas_kernels.column_write import is_column, write_columns
from tests.quick_jit import quick_jit


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_column_of_every_head_is_replaced_and_nothing_else(dtype):
    B, K, S, H = 2, 3, 384, 64  # whole tiles: the interpreter pads an array that is written in place, and leaves it so
    rng = np.random.default_rng(0)
    x, new = (jnp.asarray(rng.normal(size=(B, K, n, H)), dtype) for n in (S, 1))
    start, on = np.array([[0, 127, 128], [255, 383, 5]]), np.array([[1, 1, 1], [1, 1, 0]], bool)
    want = np.array(x, np.float32)
    for b, k in zip(*np.nonzero(on)):
        want[b, k, start[b, k]] = np.asarray(new[b, k, 0], np.float32)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = write_columns(x, new, jnp.int32(start), jnp.asarray(on))
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_columns_are_single_slots_of_heads_narrower_than_a_tile():
    zeros = lambda S, H, dtype="bfloat16": jnp.zeros((1, 1, S, H), dtype)
    assert is_column(zeros(300, 64), zeros(1, 64))
    assert not is_column(zeros(300, 128), zeros(1, 128)) and not is_column(zeros(300, 64), zeros(2, 64))
    assert not is_column(zeros(64, 64), zeros(1, 64)) and not is_column(zeros(300, 64, "uint32"), zeros(1, 64))


def test_a_written_token_can_be_differentiated():
    B, K, S, H = 1, 2, 256, 64
    old, new = jnp.ones((B, K, S, H)), jnp.ones((B, K, 1, H))
    assert is_column(old, new)
    start, on = jnp.array([[3, 200]]), jnp.array([[True, False]])
    weights = jnp.float32(np.random.default_rng(0).normal(size=old.shape))
    total = lambda old, new: jnp.sum(weights * write_windows(old, new, start, on))
    of_old, of_new = quick_jit(jax.grad(total, argnums=(0, 1)))(old, new)
    np.testing.assert_array_equal(of_old, weights.at[0, 0, 3].set(0))  # what is written over does not count
    np.testing.assert_array_equal(of_new[0, :, 0], [weights[0, 0, 3], jnp.zeros(H)])
