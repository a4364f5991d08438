"""`prefill_attention` against float64 NumPy, with the boundaries of its query blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill_attention import api as op
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

# One program a shape compiles faster than its operations one by one.
prefill_attention = quick_jit(op.prefill_attention, static_argnames=("window", "scale"))

# float32: products of 16 terms and sums of up to 600 probabilities.
FLOAT32 = dict(rtol=2e-5, atol=2e-5)
BLOCK = 256


def _draw(seed, B, T, lengths, K=1, G=2, H=16, start=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, K * G, H))
    k, v = rng.normal(size=(2, B, K, T, H))
    index = np.arange(T)
    pos = np.where(index < np.array(lengths)[:, None], start + index, -1)
    return (*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.int32(pos))


def _check(args, tolerance=FLOAT32, **how):
    got = prefill_attention(*args, **how)
    q, k, v, pos = args
    k_pos = np.broadcast_to(np.asarray(pos)[:, None], k.shape[:3])
    want = attention(q, k, v, pos, k_pos, **how)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, want.out, **tolerance)
    np.testing.assert_allclose(got.lse, want.lse, **tolerance)


@pytest.mark.parametrize("T", [1, 31, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_lengths_around_block_boundaries(T):
    _check(_draw(T, 1, T, [T]))


@pytest.mark.parametrize("window", [1, 3, BLOCK, BLOCK + 1])
def test_windows_around_block_boundaries(window):
    _check(_draw(window, 1, BLOCK + 40, [BLOCK + 40]), window=window)


def test_groups_and_several_kv_heads():
    _check(_draw(0, 2, 20, [20, 20], K=2, G=3))


def test_padding_rows_are_empty_and_change_nothing():
    T = BLOCK + 9
    q, k, v, pos = _draw(1, 3, T, [T, BLOCK - 2, 1])
    _check((q, k, v, pos))
    part = prefill_attention(q, k, v, pos)
    padding = np.asarray(pos) < 0
    assert not np.asarray(part.out)[padding].any()
    assert (np.asarray(part.lse)[padding] == -np.inf).all()
    n = BLOCK - 2
    alone = prefill_attention(q[1:2, :n], k[1:2, :, :n], v[1:2, :, :n], pos[1:2, :n])
    np.testing.assert_allclose(part.out[1:2, :n], alone.out, **FLOAT32)


def test_a_later_chunk_counts_positions_from_where_it_starts():
    first = prefill_attention(*_draw(2, 1, 30, [30]), window=7)
    later = prefill_attention(*_draw(2, 1, 30, [30], start=1000), window=7)
    np.testing.assert_array_equal(first.out, later.out)


def test_a_scale_replaces_the_default():
    _check(_draw(3, 1, 20, [20]), scale=2.0)


def test_bfloat16():
    # Queries are scaled and probabilities rounded in bfloat16, 8 bits each.
    _check(_draw(4, 1, 40, [40], H=64, dtype=jnp.bfloat16), dict(rtol=2e-2, atol=2e-2))
