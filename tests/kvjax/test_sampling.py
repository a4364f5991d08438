"""Samplers draw from the distribution they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import Greedy, Sample

PROBABILITY = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
LOGITS = jnp.log(jnp.asarray(PROBABILITY, jnp.float32)) + 3.0
DRAWS = 4000


def _frequencies(sampler) -> np.ndarray:
    tokens = sampler(jnp.tile(LOGITS, (DRAWS, 1)), jax.random.key(0))
    assert tokens.shape == (DRAWS,) and tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=5) / DRAWS


def _check(sampler, expected):
    expected = np.asarray(expected) / np.sum(expected)
    # Five standard deviations of a binomial share.
    slack = 5 * np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(_frequencies(sampler) - expected) <= slack).all()


def test_greedy_takes_the_mode_and_the_lower_of_a_tie():
    logits = jnp.array([[0.0, 2.0, 1.0], [5.0, 5.0, 1.0]])
    tokens = Greedy()(logits, jax.random.key(0))
    assert tokens.tolist() == [1, 0] and tokens.dtype == jnp.int32


def test_temperature_one_is_the_softmax():
    _check(Sample(), PROBABILITY)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature):
    _check(Sample(temperature=temperature), PROBABILITY ** (1 / temperature))


def test_a_tiny_temperature_is_greedy():
    _check(Sample(temperature=1e-6), [1, 0, 0, 0, 0])


@pytest.mark.parametrize("k, kept", [(1, 1), (2, 2), (3, 3), (5, 5), (100, 5)])
def test_top_k_keeps_the_k_most_likely(k, kept):
    _check(Sample(top_k=k), np.where(np.arange(5) < kept, PROBABILITY, 0))


@pytest.mark.parametrize("p, kept", [(0.1, 1), (0.39, 1), (0.5, 2), (0.69, 2), (0.71, 3), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    _check(Sample(top_p=p), np.where(np.arange(5) < kept, PROBABILITY, 0))


def test_top_k_comes_before_top_p():
    # Of the three most likely, renormalised to 4/9, 3/9, 2/9, the first two reach 0.7.
    _check(Sample(top_k=3, top_p=0.7), [0.4, 0.3, 0, 0, 0])


def test_the_same_key_draws_the_same_tokens():
    logits = jnp.tile(LOGITS, (50, 1))
    first, second, other = (Sample()(logits, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_samplers_are_hashable_static_arguments():
    assert len({Greedy(), Greedy(), Sample(0.7), Sample(0.7), Sample(0.8)}) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(temperature=0.0), r"temperature must be above 0, got 0.0; Greedy\(\) draws the mode"),
        (dict(temperature=-1.0), "temperature must be above 0, got -1.0"),
        (dict(temperature=float("nan")), "temperature must be above 0, got nan"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), r"top_p must be in \(0, 1\], got 1.1"),
    ],
)
def test_impossible_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sample(**arguments)
