"""Slots written as columns or rows of tiles, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.segments.moves import write_windows
from pallas_kernels.slot_write import takes_slot, write_slot
from tests.quick_jit import quick_jit


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_slot_of_every_head_is_replaced_and_nothing_else(dtype, H):
    B, K, S = 2, 3, 384  # whole tiles: the interpreter pads an array that is written in place, and leaves it so
    rng = np.random.default_rng(0)
    x, new = (jnp.asarray(rng.normal(size=(B, K, n, H)), dtype) for n in (S, 1))
    start, on = np.array([[0, 127, 128], [255, 383, 5]]), np.array([[1, 1, 1], [1, 1, 0]], bool)
    want = np.array(x, np.float32)
    for b, k in zip(*np.nonzero(on)):
        want[b, k, start[b, k]] = np.asarray(new[b, k, 0], np.float32)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = write_slot(x, new, jnp.int32(start), jnp.asarray(on))
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_what_xla_writes_in_place_by_itself_is_left_to_it():
    zeros = lambda S, H, dtype="bfloat16": jnp.zeros((1, 1, S, H), dtype)
    assert takes_slot(zeros(300, 64), zeros(1, 64)) and takes_slot(zeros(300, 128), zeros(1, 128))
    assert not takes_slot(zeros(304, 128), zeros(1, 128)) and not takes_slot(zeros(300, 64), zeros(2, 64))
    assert not takes_slot(zeros(64, 64), zeros(1, 64)) and not takes_slot(zeros(300, 64, "uint32"), zeros(1, 64))


def test_a_written_token_can_be_differentiated():
    B, K, S, H = 1, 2, 256, 64
    old, new = jnp.ones((B, K, S, H)), jnp.ones((B, K, 1, H))
    assert takes_slot(old, new)
    start, on = jnp.array([[3, 200]]), jnp.array([[True, False]])
    weights = jnp.float32(np.random.default_rng(0).normal(size=old.shape))
    total = lambda old, new: jnp.sum(weights * write_windows(old, new, start, on))
    of_old, of_new = quick_jit(jax.grad(total, argnums=(0, 1)))(old, new)
    np.testing.assert_array_equal(of_old, weights.at[0, 0, 3].set(0))  # what is written over does not count
    np.testing.assert_array_equal(of_new[0, :, 0], [weights[0, 0, 3], jnp.zeros(H)])
