"""Attention of a prompt over chosen blocks: the reference and the TPU kernel in interpret mode, against NumPy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention import block_attention
from tests.pallas_kernels.kernel_tolerance import tolerance
from tests.pallas_kernels.test_two_cores import races_found
from tests.quick_jit import quick_jit

BLOCK = 128


def _prompt(seed, dtype, B, blocks, K, G, H, most):
    """Rows of a padded prompt, and a table: some blocks before each block of queries, itself last."""
    rng = np.random.default_rng(seed)
    T, N = blocks * BLOCK, K * G
    q, k, v = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, K, T, H)), rng.normal(size=(B, K, T, H))
    pos = np.tile(np.arange(T), (B, 1))
    pos[-1, T - BLOCK - 30 :] = -1
    index = np.full((B, N, blocks, most), -1)
    for b, n, i in np.ndindex(B, N, blocks):
        chosen = [*rng.permutation(i)[: rng.integers(0, most)], i]
        index[b, n, i, : len(chosen)] = np.sort(chosen)
    arrays = (jnp.asarray(x, dtype) for x in (q, k, v))
    return *arrays, jnp.int32(pos), jnp.int32(index)


def _attention(q, k, v, pos, index, window):
    """Dense attention of every query, without the keys of blocks that its table does not name."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    pos, index = np.asarray(pos), np.asarray(index)
    B, T, N, H = q.shape
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        head = n // (N // k.shape[1])
        read = np.isin(np.arange(T) // BLOCK, index[b, n, t // BLOCK][index[b, n, t // BLOCK] >= 0])
        seen = read & (pos[b] >= 0) & (pos[b] <= pos[b, t])
        if window is not None:
            seen &= pos[b] > pos[b, t] - window
        if seen.any():
            logits = k[b, head, seen] @ q[b, t, n] * H**-0.5
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights @ v[b, head, seen] / weights.sum()
            lse[b, t, n] = logits.max() + np.log(weights.sum())
    return out, lse


def _run(arrays, implementation, window=None):
    run = functools.partial(block_attention, block=BLOCK, window=window, implementation=implementation)
    return quick_jit(run)(*arrays)


@pytest.mark.parametrize("dtype, G, H, most, window", [("float32", 2, 128, 4, None), ("bfloat16", 1, 256, 2, 200)])
def test_what_the_table_names_is_attended_to(dtype, G, H, most, window):
    arrays = _prompt(0, dtype, 2, 4, 1, G, H, most)
    expected = _attention(*arrays, window)
    of_xla = _run(arrays, "xla", window)
    interpreted = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    with pltpu.force_tpu_interpret_mode(interpreted):
        of_kernel = _run(arrays, "mosaic_tpu", window)
    assert not races_found()
    for part in (of_xla, of_kernel):
        for got, want in zip(part, expected):
            np.testing.assert_allclose(got, want, **tolerance(dtype))


def test_a_table_beyond_the_prompt_reads_nothing_else():
    """Ends as the last block, of which causality hides what is ahead."""
    arrays = _prompt(1, "float32", 1, 3, 1, 1, 128, 2)
    *others, index = arrays
    beyond = index.at[0, 0, 2].set(jnp.array([0, 9]))
    inside = index.at[0, 0, 2].set(jnp.array([0, 2]))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        for implementation in ("xla", "mosaic_tpu"):
            got, want = (_run((*others, table), implementation) for table in (beyond, inside))
            np.testing.assert_array_equal(got.out, want.out)


def test_what_no_kernel_takes_is_refused_by_name():
    q, k, v, pos, index = _prompt(0, "float32", 1, 2, 1, 1, 64, 2)
    with pytest.raises(NotImplementedError, match="takes heads of 128 or 256 in q, k and v alike, got 64 and 64"):
        _run((q, k, v, pos, index), "mosaic_tpu")
    with pytest.raises(ValueError, match="index must be of T / block = 256 / 128 blocks of queries, got"):
        _run((q, k, v, pos, index[:, :, :1]), "xla")
