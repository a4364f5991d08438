"""A schedule says when a transform acts; what is around it, and the drivers, follow it."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import kvjax
from tests.kvjax import tiny_model

T, CHUNK = 9, 4


def _recording(log, **schedule):
    """Changes nothing and writes down what ran, in which phase."""

    def init(cache, observation):
        log.append(f"init in {observation.phase}, growing {observation.grows}")
        return cache, jnp.zeros_like(observation.prompt)

    def update(cache, state, observation):
        log.append(f"update in {observation.phase}, growing {observation.grows}")
        return cache, state + 1

    def observe(cache, state, observation):
        log.append(f"observe in {observation.phase}")
        return cache, state + 10

    observer = kvjax.Observer(after_call=observe)
    return kvjax.CacheTransform(init, update, kvjax.Schedule(observer=observer, **schedule))


def _lived(transform):
    """Runs a prompt in chunks and one call; what happened is seen when each is traced, once."""
    step = tiny_model.bind(tiny_model.params())
    tokens, lengths = tiny_model.prompt(1, T), jnp.array([T])
    run = kvjax.prefill(step, transform, tokens, lengths, tiny_model.empty(1), room=2, chunk=CHUNK)
    run, _ = kvjax.extend(step, transform, run, tokens[:, :1], jnp.array([1]))
    return run.state


def test_by_default_a_transform_acts_when_the_prompt_is_in_and_after_every_later_call():
    log = []
    assert _lived(_recording(log)) == 11
    assert log == ["init in prefill, growing False", "observe in decode", "update in decode, growing False"]


def test_a_bounded_prefill_starts_on_an_empty_cache_and_acts_after_chunks():
    log = []
    _lived(_recording(log, frees_in_prefill=T))
    before, chunk, at_end, call = log[:1], log[1:3], log[-3:-2], log[-2:]
    assert before == ["init in begin, growing False"] and at_end == ["init in prefill, growing False"]
    assert chunk == ["observe in prefill", "update in prefill, growing False"]
    assert call == ["observe in decode", "update in decode, growing False"]


def test_every_chunk_leaves_decoding_alone_and_says_that_the_cache_grows():
    log = []
    assert _lived(kvjax.every_chunk(_recording(log, frees_in_prefill=1))) == 0
    assert {line for line in log if line.startswith("init")} == {
        "init in begin, growing True",
        "init in prefill, growing True",
    }
    assert {line for line in log if "decode" in line} == set() and "update in prefill, growing True" in log


@pytest.mark.parametrize("bounded", [False, True])
def test_at_prefill_end_acts_once_beside_whatever_acts_later(bounded):
    once, later = [], []
    beside = _recording(later, frees_in_prefill=T if bounded else None)
    transform = kvjax.chain(kvjax.at_prefill_end(_recording(once)), beside)
    assert transform.schedule.acts_in == ("prefill", "decode")
    state = _lived(transform)
    assert once == ["init in prefill, growing True"] and state == (0, 11)
    assert ("init in begin, growing False" in later) is bounded


def test_a_chain_of_what_acts_once_acts_once():
    chained = kvjax.chain(kvjax.cast("bfloat16"), kvjax.at_prefill_end(_recording([])))
    assert chained.schedule.acts_in == () and kvjax.chain().schedule.acts_in == ()
    with pytest.raises(ValueError, match="protect needs a transform that acts once"):
        kvjax.protect(kvjax.chain(chained, _recording([])), kvjax.scores.negative_key_norm(), 4)


def test_what_is_wrapped_keeps_statistics_while_it_waits():
    log = []
    transform = kvjax.every(3, _recording(log))
    step, tokens = tiny_model.bind(tiny_model.params()), tiny_model.prompt(1, T)
    run = kvjax.prefill(step, transform, tokens, jnp.array([T]), tiny_model.empty(1), room=8)
    for expected in (10, 20, 31, 41):
        run, _ = kvjax.extend(step, transform, run, tokens[:, :1], jnp.array([1]))
        assert run.state[0] == expected
