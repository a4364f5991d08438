"""`attention_mass`: the column sums of the softmax that NumPy computes in full."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention_mass import api as op
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

# One program a shape compiles faster than its operations one by one.
attention_mass = quick_jit(op.attention_mass, static_argnames=("window", "scale", "reduce"))

# float32: sums of up to 600 probabilities below one.
FLOAT32 = dict(rtol=3e-5, atol=3e-5)


def _draw(seed, B=2, T=5, K=2, G=2, S=23, H=16, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, K * G, H))
    k, v = rng.normal(size=(2, B, K, S, H))
    k_pos = np.tile(np.arange(S), (B, K, 1))
    k_pos = rng.permuted(np.where(rng.random(k_pos.shape) < 0.125, -1, k_pos), axis=2)
    q_pos = np.sort(rng.integers(0, S + 1, size=(B, T)), axis=1)
    return (*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.int32(q_pos), jnp.int32(k_pos))


def _check(q, k, v, q_pos, k_pos, tolerance=FLOAT32, **how):
    whole = attention(q, k, v, q_pos, k_pos, **how)
    mass = attention_mass(q, k, q_pos, k_pos, jnp.float32(whole.lse), **how)
    assert mass.dtype == jnp.float32
    np.testing.assert_allclose(mass, whole.probability.sum(axis=1), **tolerance)
    return mass


def test_two_slots_by_hand():
    # Query 0 sees slot 0 alone; query 1 gives 1/4 and 3/4: the columns sum to 5/4 and 3/4.
    q = jnp.ones((1, 2, 1, 1))
    k = jnp.array([0.0, np.log(3.0)]).reshape(1, 1, 2, 1)
    lse = jnp.log(jnp.array([1.0, 4.0])).reshape(1, 2, 1)
    mass = attention_mass(q, k, jnp.array([[0, 1]]), jnp.array([[[0, 1]]]), lse, scale=1.0)
    np.testing.assert_allclose(mass.ravel(), [1.25, 0.75], rtol=1e-6)


@pytest.mark.parametrize("T", [1, 255, 256, 257, 520])
def test_numbers_of_queries_around_block_boundaries(T):
    _check(*_draw(T, B=1, T=T, K=1, S=40))


@pytest.mark.parametrize("G", [1, 3])
def test_groups(G):
    _check(*_draw(G, G=G))


@pytest.mark.parametrize("window", [1, 4])
def test_windows(window):
    _check(*_draw(window), window=window)


def test_bias_and_scale():
    args = _draw(3)
    bias = jnp.float32(np.random.default_rng(3).normal(size=args[4].shape))
    _check(*args, bias=bias, scale=0.3)


def test_mass_adds_up_to_the_queries_that_see_something():
    q, k, v, q_pos, k_pos = _draw(4)
    q_pos = q_pos.at[0, :2].set(-1)
    mass = _check(q, k, v, q_pos, k_pos)
    first = int(np.asarray(k_pos)[np.asarray(k_pos) >= 0].min())
    assert first == 0
    sees = [[(q_pos[b] >= min(p for p in k_pos[b, h].tolist() if p >= 0)).sum() for h in (0, 0, 1, 1)] for b in (0, 1)]
    np.testing.assert_allclose(mass.sum(axis=-1), sees, rtol=1e-5)


def test_parts_of_the_slots_get_their_share_of_the_whole():
    q, k, v, q_pos, k_pos = _draw(5)
    whole = attention(q, k, v, q_pos, k_pos)
    lse = jnp.float32(whole.lse)
    halves = [attention_mass(q, k[:, :, s], q_pos, k_pos[:, :, s], lse) for s in (np.s_[:9], np.s_[9:])]
    np.testing.assert_allclose(jnp.concatenate(halves, axis=-1), whole.probability.sum(axis=1), **FLOAT32)


def test_hidden_slots_with_huge_logits_get_exactly_nothing():
    q, k, v, q_pos, k_pos = _draw(6)
    lse = jnp.float32(attention(q, k, v, q_pos, k_pos).lse)
    hidden = (k_pos < 0)[..., None]
    mass = attention_mass(q, jnp.where(hidden, 1e6, k), q_pos, k_pos, lse)
    assert jnp.isfinite(mass).all()
    np.testing.assert_array_equal(np.asarray(mass).reshape(2, 2, 2, -1).max(axis=2)[np.asarray(k_pos) < 0], 0.0)
    # A key in the future of all queries is as hidden as an empty slot.
    future = attention_mass(q, k * 1e6, jnp.zeros_like(q_pos), jnp.where(k_pos == 0, 1, k_pos), 0 * lse)
    np.testing.assert_array_equal(future, 0.0)


def test_queries_that_saw_nothing_add_nothing():
    q, k, v, q_pos, k_pos = _draw(7)
    mass = attention_mass(q, k, jnp.full_like(q_pos, -1), k_pos, jnp.full(q.shape[:3], -jnp.inf))
    np.testing.assert_array_equal(mass, 0.0)


def test_bfloat16():
    # Queries are scaled in bfloat16 (8 bits) while the lse comes from exact logits.
    _check(*_draw(8, H=64, dtype=jnp.bfloat16), tolerance=dict(rtol=4e-2, atol=2e-2))


@pytest.mark.parametrize("reduce", ["max", "squares", "entropy"])
@pytest.mark.parametrize("T", [5, 520])
def test_other_summaries_than_the_sum(reduce, T):
    q, k, v, q_pos, k_pos = _draw(9, T=T, K=1 if T > 5 else 2)
    whole = attention(q, k, v, q_pos, k_pos, window=8)
    p = whole.probability
    summary = {
        "max": lambda: p.max(axis=1),
        "squares": lambda: (p**2).sum(axis=1),
        "entropy": lambda: -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1),
    }
    got = attention_mass(q, k, q_pos, k_pos, jnp.float32(whole.lse), window=8, reduce=reduce)
    np.testing.assert_allclose(got, summary[reduce](), **FLOAT32)


def test_another_summary_is_refused():
    q, k, v, q_pos, k_pos = _draw(0)
    with pytest.raises(ValueError, match="reduce must be one of sum, max, squares, entropy, got 'mean'"):
        op.attention_mass(q, k, q_pos, k_pos, jnp.zeros(q.shape[:3]), reduce="mean")
