"""A decoder and a method bound together do what the free functions do, with windows respected."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from tests.kvjax import table_decoder, tiny_model
from tests.quick_jit import quick_jit

T, ROOM, STOP = 12, 5, 7
WINDOWED = dataclasses.replace(tiny_model.CONFIG, window=8, local_layers=(0,), local_rope_base=1000.0)
TOKENS, LENGTHS = tiny_model.prompt(2, T), jnp.array([T, T - 3])
METHOD = kvjax.methods.keydiff(budget=0.5)


def _by_hand(params):
    step, method = tiny_model.bind(params, WINDOWED), kvjax.respect_windows(METHOD)
    run = kvjax.prefill(step, method, TOKENS, LENGTHS, tiny_model.empty(2, WINDOWED), room=ROOM, call_tokens=2)
    run, _ = kvjax.extend(step, method, run, TOKENS[:, :2], jnp.array([2, 1]))
    how = dict(max_new_tokens=3, sampler=kvjax.Greedy(), key=jax.random.key(0), stop_tokens=(STOP,))
    return kvjax.generate(step, method, run, **how)


def _through_the_door(lm):
    run = lm.prefill(TOKENS, LENGTHS, room=ROOM, call_tokens=2)
    run, _ = lm.extend(run, TOKENS[:, :2], jnp.array([2, 1]))
    return lm.generate(run, 3)


def test_it_does_what_the_free_functions_do_and_respects_windows():
    params = tiny_model.params(WINDOWED)
    lm = kvjax.bind(tiny_model.bind(params, WINDOWED), METHOD, stop_tokens=[STOP])
    bound, by_hand = quick_jit(_through_the_door)(lm), quick_jit(_by_hand)(params)
    assert bound.run.cache.layers[0].segments[-1].layout == kvjax.Ring()  # of the window
    assert jax.tree.structure(bound) == jax.tree.structure(by_hand)
    for a, b in zip(jax.tree.leaves(bound), jax.tree.leaves(by_hand)):
        np.testing.assert_array_equal(a, b)


def test_a_jitted_function_that_takes_it_is_traced_once_for_all_weights():
    traced = []

    @jax.jit
    def read(lm, tokens, lengths):
        traced.append(lm)
        return lm.prefill(tokens, lengths, room=1).logits

    lm = kvjax.bind(tiny_model.bind(tiny_model.params()), METHOD)
    half = jax.tree.map(lambda x: x / 2, lm)
    first, second = read(lm, TOKENS, LENGTHS), read(half, TOKENS, LENGTHS)
    assert len(traced) == 1 and not np.allclose(first, second)


def test_a_plain_function_needs_to_be_told_what_an_empty_cache_is():
    step = table_decoder.decoder(table_decoder.tables())
    with pytest.raises(ValueError, match="empty_cache must be given for a decoder without a method of that name"):
        kvjax.bind(step, METHOD)
    lm = kvjax.bind(step, METHOD, empty_cache=table_decoder.empty)
    run = lm.prefill(TOKENS, LENGTHS, room=0)
    expected = kvjax.prefill(step, METHOD, TOKENS, LENGTHS, table_decoder.empty(2), room=0)
    np.testing.assert_array_equal(run.logits, expected.logits)


def test_only_a_transform_can_be_bound():
    with pytest.raises(TypeError, match="^method must be a CacheTransform, such as .*, got <function"):
        kvjax.bind(tiny_model.bind(tiny_model.params()), kvjax.methods.snapkv)
