"""The last layer goes on with the tokens that somebody reads: the same numbers as for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from tests.kvjax import tiny_model
from tests.quick_jit import quick_jit

T, LENGTHS = 24, (24, 3)


def _read(needs, last_only):
    positions = jnp.where(jnp.arange(T) < jnp.array(LENGTHS)[:, None], jnp.arange(T), -1)
    step = tiny_model.bind(tiny_model.params())
    return step(tiny_model.prompt(2, T), positions, tiny_model.empty(2), needs=needs, last_only=last_only)


@pytest.mark.parametrize("queries", [0, 1, 5])
def test_what_is_read_at_the_end_of_a_prompt_does_not_depend_on_the_shortcut(queries):
    needs = kvjax.Needs(queries=queries)
    short, whole = _read(needs, True), _read(needs, False)
    expected = [whole.logits[row, n - 1] for row, n in enumerate(LENGTHS)]
    np.testing.assert_allclose(short.logits[:, 0], expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(short.cache), jax.tree.leaves(whole.cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(short.layers, whole.layers, strict=True):
        real = np.asarray(b.queries.pos >= 0)
        np.testing.assert_array_equal(a.queries.pos[:, -queries:] if queries else a.queries.pos, b.queries.pos)
        take = lambda x: np.asarray(x)[:, -queries:][real] if queries else np.asarray(x)[:, :0]
        np.testing.assert_allclose(take(a.queries.raw), take(b.queries.raw), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(take(a.lse), take(b.lse), rtol=1e-5, atol=1e-5)


def test_the_shortcut_is_taken_where_nothing_else_is_read():
    """A quarter of the arithmetic of a two-layer model is gone, and none where every query is looked at."""
    flops = lambda needs, last_only: jax.jit(lambda: _read(needs, last_only)).lower().cost_analysis()["flops"]
    unembed = 2 * 2 * (T - 1) * tiny_model.CONFIG.vocab_size * tiny_model.CONFIG.width
    everything = flops(kvjax.Needs(), False) - unembed
    assert flops(kvjax.Needs(), True) < 0.75 * everything
    assert flops(kvjax.Needs(queries=kvjax.ALL), True) > 0.95 * everything


def test_the_last_token_alone_is_read_from_a_pool_of_all_layers():
    method = kvjax.methods.cake(8, window=4)

    @quick_jit
    def program(tokens, cache):
        step = tiny_model.bind(tiny_model.params())
        cache = kvjax.prefill(step, method, tokens, jnp.array(LENGTHS), cache, room=8).cache
        call = lambda last_only: step(
            tokens[:, :5], cache.length[:, None] + jnp.arange(5), cache, needs=kvjax.Needs(), last_only=last_only
        )
        return call(True).logits[:, 0], call(False).logits[:, -1]

    np.testing.assert_allclose(*program(tiny_model.prompt(2, T), tiny_model.empty(2)), rtol=1e-5, atol=1e-5)
