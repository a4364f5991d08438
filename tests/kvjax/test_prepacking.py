"""Prompts that are read in shared rows are what a padded batch makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from kvjax.reuse import packed_rows, prepacking
from kvjax.reuse.prepacking import OwnPrompt
from pallas_kernels.prefill_attention import prefill_attention
from tests.kvjax import tiny_model
from tests.quick_jit import quick_jit

CLOSE = dict(rtol=1e-5, atol=1e-5)
LENGTHS = (13, 1, 6, 9, 3, 14)


@functools.cache
def _prompts() -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(0)
    return tuple(tuple(rng.integers(1, tiny_model.CONFIG.vocab_size, size=n).tolist()) for n in LENGTHS)


def _padded(step, transform, room):
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, prompt in enumerate(_prompts()):
        tokens[row, : len(prompt)] = prompt
    return kvjax.prefill(
        step, transform, jnp.asarray(tokens), jnp.int32(LENGTHS), tiny_model.empty(len(LENGTHS)), room=room
    )


def test_first_fit_decreasing_fills_rows():
    assert packed_rows([3, 9, 0, 5, 7, 1, 2], 10) == [(1, 5, 2), (4, 0), (3, 6)]
    assert packed_rows([], 4) == []
    with pytest.raises(ValueError, match="capacity must be at least the longest prompt's 9 tokens, got 8"):
        packed_rows([3, 9], 8)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_a_token_sees_its_own_prompt_alone(window):
    rng, parts, C = np.random.default_rng(1), (4, 6, 1), 13
    q, k, v = (jnp.float32(rng.normal(size=shape)) for shape in ((1, C, 4, 8), (1, 2, C, 8), (1, 2, C, 8)))
    pos = jnp.int32([[*(t for n in parts for t in range(n)), -1, -1]])
    spans = [slice(start, start + n) for start, n in zip(np.cumsum([0, *parts]), parts)]

    def both(q, k, v, pos):
        alone = lambda own: prefill_attention(q[:, own], k[:, :, own], v[:, :, own], pos[:, own], window=window)
        return OwnPrompt()(q, k, v, pos, window=window), [alone(own) for own in spans]

    got, expected = quick_jit(both)(q, k, v, pos)
    for own, alone in zip(spans, expected):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x[:, own], y, **CLOSE), got, alone)
    assert np.all(np.isneginf(got.lse[:, sum(parts) :])) and not np.any(got.out[:, sum(parts) :])


@pytest.mark.parametrize(
    "build",
    [
        methods.full,
        pytest.param(lambda: methods.kivi(4, group=8, residual=8), marks=pytest.mark.slow),
        pytest.param(lambda: methods.snapkv(8, window=3, kernel=3), marks=pytest.mark.slow),
        pytest.param(lambda: methods.h2o(8), marks=pytest.mark.slow),
        pytest.param(lambda: methods.expected_attention(8, sinks=1), marks=pytest.mark.slow),
    ],
)
def test_packed_prompts_are_those_of_a_padded_batch(build):
    transform, step, room = build(), tiny_model.bind(tiny_model.params()), 4
    packed = prepacking(step, transform, _prompts(), tiny_model.empty, room=room, capacity=16)
    padded = _padded(step, transform, room)
    assert jax.tree.structure(packed) == jax.tree.structure(padded)
    assert packed.room == padded.room
    np.testing.assert_allclose(packed.logits, padded.logits, **CLOSE)
    np.testing.assert_array_equal(packed.cache.length, padded.cache.length)
    for got, expected in zip(packed.cache.layers, padded.cache.layers):
        for mine, other in zip(got.segments, expected.segments):
            np.testing.assert_array_equal(mine.pos, other.pos)
    answer = jnp.int32([[5]] * len(LENGTHS))
    ones = jnp.ones(len(LENGTHS), jnp.int32)
    logits = [kvjax.extend(step, transform, run, answer, ones)[1] for run in (packed, padded)]
    np.testing.assert_allclose(*logits, **CLOSE)


@pytest.mark.parametrize(
    "transform, message",
    [
        (lambda: methods.xattention(), "chooses what a prompt reads"),
        (lambda: methods.kvzip(4), "reads the prompt again"),
    ],
)
def test_what_cannot_share_rows_is_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        prepacking(None, transform(), _prompts(), tiny_model.empty, room=4)
    with pytest.raises(ValueError, match="at least 1 token each"):
        prepacking(None, methods.full(), [[1], []], tiny_model.empty, room=4)
