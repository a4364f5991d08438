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


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_no_temperature_is_too_small_for_float32(temperature, scale):
    logits = jnp.tile(LOGITS[::-1] * scale, (50, 1))
    assert (Sample(temperature=temperature)(logits, jax.random.key(0)) == 4).all()


@pytest.mark.parametrize("k, kept", [(1, 1), (2, 2), (3, 3), (5, 5), (100, 5)])
def test_top_k_keeps_the_k_most_likely(k, kept):
    _check(Sample(top_k=k), np.where(np.arange(5) < kept, PROBABILITY, 0))


@pytest.mark.parametrize("p, kept", [(0.1, 1), (0.39, 1), (0.5, 2), (0.69, 2), (0.71, 3), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    _check(Sample(top_p=p), np.where(np.arange(5) < kept, PROBABILITY, 0))


def test_top_p_of_one_drops_nothing():
    # A cut at 1 would: sums of rounded probabilities reach 1 before the last token.
    program = lambda sampler: str(jax.make_jaxpr(sampler)(LOGITS[None], jax.random.key(0)))
    assert program(Sample(top_p=1.0)) == program(Sample()) != program(Sample(top_p=0.999))


@pytest.mark.parametrize("how", [dict(top_k=3), dict(top_p=0.6)])
def test_ties_at_a_cut_go_to_the_lowest_ids(how):
    drawn = Sample(**how)(jnp.zeros((400, 5)), jax.random.key(0))  # five equal tokens
    assert sorted(set(drawn.tolist())) == [0, 1, 2]


def test_a_row_draws_the_same_alone_and_in_a_batch():
    keys = jax.random.split(jax.random.key(3), 12)
    logits = jax.random.normal(jax.random.key(4), (12, 30))
    together = Sample(top_p=0.9)(logits, keys)
    alone = [int(Sample(top_p=0.9)(logits[i : i + 1], keys[i : i + 1])[0]) for i in range(12)]
    assert together.tolist() == alone and len(set(alone)) > 4


@pytest.mark.parametrize("sampler", [Greedy(), Sample(), Sample(top_k=2), Sample(top_p=0.5)])
def test_rows_without_logits_draw_no_token(sampler):
    logits = jnp.stack([LOGITS, LOGITS.at[2].set(jnp.nan), jnp.full(5, jnp.nan)])
    drawn = sampler(logits, jax.random.key(0)).tolist()
    assert 0 <= drawn[0] < 5 and drawn[1:] == [-1, -1]


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


def test_an_infinite_logit_is_the_most_likely():
    logits = jnp.array([[0.0, 1.0, 2.0, jnp.inf, 1.0]] * 20)
    for sampler in (Greedy(), Sample(), Sample(0.7, 3, 0.9)):
        assert (sampler(logits, jax.random.key(0)) == 3).all()
