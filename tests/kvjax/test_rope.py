"""Rotary positions against complex numbers, and the laws that re-indexing relies on."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import Rope, re_rotate, rotate

H, BASE = 16, 10000.0
ROPE = Rope.from_base(BASE, H)


def _complex(x, pos, inv_freq):
    """`(x[i] + j x[i + H/2]) * exp(j pos inv_freq[i])` in float64."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.asarray(pos)[..., None] * inv_freq)
    return np.concatenate([z.real, z.imag], axis=-1)


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=(*shape, H)).astype(np.float32)


def test_frequencies_by_hand():
    # base ** (-2 i / H): 1, then a factor 10000 ** (-1 / 8) = 10 ** -0.5 each.
    np.testing.assert_allclose(ROPE.inv_freq, 10.0 ** (-0.5 * np.arange(8)), rtol=1e-6)


def test_a_quarter_turn_by_hand():
    rope = Rope(inv_freq=jnp.array([np.pi / 2]))
    np.testing.assert_allclose(rotate(jnp.array([3.0, 4.0]), jnp.array(1), rope), [-4.0, 3.0], atol=1e-6)


@pytest.mark.parametrize("start", [0, 4000, 100_000])
def test_rotation_is_multiplication_by_a_complex_phase(start):
    x, pos = _draw(start, 2, 3, 50), start + np.arange(50)
    # The same float32 frequencies on both sides; the angle itself is rounded to 24 bits: pos * 2 ** -24 radians.
    got = rotate(jnp.asarray(x), jnp.asarray(pos), ROPE)
    want = _complex(x.astype(np.float64), pos, np.asarray(ROPE.inv_freq, np.float64))
    np.testing.assert_allclose(got, want, atol=1e-5 + 5 * (start + 50) * 2.0**-24)


def test_position_zero_changes_nothing():
    x = _draw(0, 4)
    np.testing.assert_array_equal(rotate(jnp.asarray(x), jnp.zeros(4, jnp.int32), ROPE), x)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 8192), st.integers(-8192, 8192), st.integers(0, 2**32 - 1))
def test_re_rotating_adds_positions(pos, delta, seed):
    x = jnp.asarray(_draw(seed, 1))
    at = lambda p: jnp.array([p], jnp.int32)
    moved = re_rotate(rotate(x, at(pos), ROPE), at(delta), ROPE)
    # Three angles of up to 16384 radians, each rounded to 24 bits, times numbers up to about 4.
    np.testing.assert_allclose(moved, rotate(x, at(pos + delta), ROPE), atol=2e-2)
    np.testing.assert_allclose(jnp.linalg.norm(moved), jnp.linalg.norm(x), rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 300))
def test_dot_products_depend_on_distance_only(a, b, shift):
    q, k = jnp.asarray(_draw(1, 1)), jnp.asarray(_draw(2, 1))
    at = lambda p: jnp.array([p], jnp.int32)
    dot = lambda i, j: float(jnp.sum(rotate(q, at(i), ROPE) * rotate(k, at(j), ROPE)))
    # Angles up to 800 radians, rounded to 24 bits, in 16 products of order one.
    assert dot(a, b) == pytest.approx(dot(a + shift, b + shift), abs=2e-3)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    x = jnp.asarray(_draw(3, 20), jnp.bfloat16)
    pos = 1000 + jnp.arange(20)
    got = rotate(x, pos, ROPE)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rotate(x.astype(jnp.float32), pos, ROPE).astype(jnp.bfloat16))
