"""`decode_attention` against hand-computed cases and float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import api as op
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

# One program a shape compiles faster than its operations one by one.
decode_attention = quick_jit(op.decode_attention, static_argnames=("window", "scale"))

# float32: products of up to 128 terms of order one; exp doubles the logits' error.
FLOAT32 = dict(rtol=2e-5, atol=2e-5)
# bfloat16 keeps 8 bits: queries scaled, and probabilities rounded, once each.
BFLOAT16 = dict(rtol=2e-2, atol=2e-2)


def _draw(seed, B=2, T=3, K=2, G=2, S=17, H=16, dtype=np.float32):
    """Random queries, keys and values; slots in no order, an eighth of them empty."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, K * G, H))
    k, v = rng.normal(size=(2, B, K, S, H))
    k_pos = np.tile(np.arange(S), (B, K, 1))
    k_pos = rng.permuted(np.where(rng.random(k_pos.shape) < 0.125, -1, k_pos), axis=2)
    q_pos = np.sort(rng.integers(0, S + 1, size=(B, T)), axis=1)
    return (*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.int32(q_pos), jnp.int32(k_pos))


def _check(args, tolerance=FLOAT32, **how):
    got = decode_attention(*args, **how)
    want = attention(*args, **how)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, want.out, **tolerance)
    np.testing.assert_allclose(got.lse, want.lse, **tolerance)


def test_two_slots_by_hand():
    # logits log 1 and log 3 (scale 1): probabilities 1/4 and 3/4, lse log 4.
    q = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    k = jnp.array([[0.0, 9.0], [np.log(3.0), 9.0]]).reshape(1, 1, 2, 2)
    v = jnp.array([[4.0, 0.0], [0.0, 4.0]]).reshape(1, 1, 2, 2)
    part = decode_attention(q, k, v, jnp.array([[1]]), jnp.array([[[0, 1]]]), scale=1.0)
    np.testing.assert_allclose(part.out.ravel(), [1.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(part.lse.item(), np.log(4.0), rtol=1e-6)
    # The query at position 0 sees the first slot only.
    part = decode_attention(q, k, v, jnp.array([[0]]), jnp.array([[[0, 1]]]), scale=1.0)
    np.testing.assert_allclose(part.out.ravel(), [4.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(part.lse.item(), 0.0, atol=1e-6)


@pytest.mark.parametrize("H, G", [(16, 1), (64, 2), (64, 3), (128, 8)])
def test_head_sizes_and_groups(H, G):
    _check(_draw(H + G, T=2, G=G, S=33, H=H))


@pytest.mark.parametrize("S", [1, 7, 129])
def test_lengths(S):
    _check(_draw(S, S=S))


@pytest.mark.parametrize("T", [1, 5])
def test_numbers_of_queries(T):
    _check(_draw(T, T=T))


def test_without_slots_the_part_is_empty():
    part = decode_attention(*_draw(0, S=0))
    assert part.out.shape == (2, 3, 4, 16) and not part.out.any()
    assert (part.lse == -jnp.inf).all()


def test_a_row_that_sees_nothing_is_empty_and_leaves_the_others_alone():
    q, k, v, q_pos, k_pos = _draw(1)
    k_pos = k_pos.at[0].set(-1)  # an empty row
    q_pos = q_pos.at[1, 0].set(-1)  # a padding query
    part = decode_attention(q, k, v, q_pos, k_pos)
    assert not part.out[0].any() and (part.lse[0] == -jnp.inf).all()
    assert not part.out[1, 0].any() and (part.lse[1, 0] == -jnp.inf).all()
    _check((q, k, v, q_pos, k_pos))


@pytest.mark.parametrize("window", [1, 5])
def test_windows(window):
    _check(_draw(window), window=window)


def test_a_bias_counts_a_slot_as_several():
    q, k, v, q_pos, k_pos = _draw(2, S=6)
    bias = jnp.log(jnp.float32(np.random.default_rng(0).integers(1, 5, size=k_pos.shape)))
    _check((q, k, v, q_pos, k_pos), bias=bias)
    # A slot that stands for three equals three copies of it.
    three = jnp.zeros_like(bias).at[:, :, 0].set(np.log(3.0))
    copies = lambda x: jnp.concatenate([x, x[:, :, :1], x[:, :, :1]], axis=2)
    merged = decode_attention(q, k, v, q_pos, k_pos, bias=three)
    copied = decode_attention(q, copies(k), copies(v), q_pos, copies(k_pos))
    np.testing.assert_allclose(merged.out, copied.out, **FLOAT32)
    np.testing.assert_allclose(merged.lse, copied.lse, **FLOAT32)


def test_a_scale_replaces_the_default():
    _check(_draw(3), scale=0.01)


def test_bfloat16():
    _check(_draw(4, S=65, H=64, dtype=jnp.bfloat16), BFLOAT16)


def test_float32_queries_over_a_bfloat16_cache():
    q, k, v, q_pos, k_pos = _draw(5, S=65, H=64)
    _check((q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), q_pos, k_pos), BFLOAT16)


def test_huge_logits_do_not_overflow():
    q, k, v, q_pos, k_pos = _draw(6)
    part = decode_attention(q * 1e4, k * 1e4, v, q_pos, k_pos)
    want = attention(q * 1e4, k * 1e4, v, q_pos, k_pos)
    assert jnp.isfinite(part.out).all()
    np.testing.assert_allclose(part.lse, want.lse, rtol=1e-6, atol=50.0)  # 1e8 has a last place of 8


def test_masked_slots_are_not_read():
    q, k, v, q_pos, k_pos = _draw(7)
    hidden = (k_pos < 0)[..., None]
    loud = decode_attention(q, jnp.where(hidden, 1e30, k), jnp.where(hidden, 1e30, v), q_pos, k_pos)
    quiet = decode_attention(q, k, v, q_pos, k_pos)
    np.testing.assert_array_equal(loud.out, quiet.out)
    np.testing.assert_array_equal(loud.lse, quiet.lse)


def test_the_order_of_slots_does_not_matter():
    q, k, v, q_pos, k_pos = _draw(8)
    order = np.random.default_rng(0).permutation(k.shape[2])
    shuffled = decode_attention(q, k[:, :, order], v[:, :, order], q_pos, k_pos[:, :, order])
    straight = decode_attention(q, k, v, q_pos, k_pos)
    np.testing.assert_allclose(shuffled.out, straight.out, **FLOAT32)
    np.testing.assert_allclose(shuffled.lse, straight.lse, **FLOAT32)
