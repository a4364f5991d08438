"""Layers with a sliding window keep their window and nothing else, and what comes out is what the full cache gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.transforms import bounded_layers
from tests.kvjax import tiny_model
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

WINDOW, PROMPT, AFTER = 8, 40, 6
CONFIG = dataclasses.replace(tiny_model.CONFIG, window=WINDOW, local_layers=(0,), local_rope_base=1000.0)
TOKENS = tiny_model.prompt(2, PROMPT + AFTER)


def run(transform, chunk=None, config=CONFIG, compiled=quick_jit):
    """Logits of the tokens after the prompt, one by one, and the cache at the end."""
    lengths = jnp.array([PROMPT, PROMPT - 3])

    @compiled
    def all_of_it(params):
        step = tiny_model.bind(params, config)
        after = kvjax.prefill(
            step, transform, TOKENS[:, :PROMPT], lengths, tiny_model.empty(2, config), room=AFTER, chunk=chunk
        )

        def one(after, token):
            after, logits = kvjax.extend(step, transform, after, token[:, None], jnp.ones(2, int))
            return after, logits[:, 0]

        after, logits = jax.lax.scan(one, after, TOKENS[:, PROMPT:].T)
        return logits, after.cache

    return all_of_it(tiny_model.params(config))


@functools.cache
def full_cache():
    return run(kvjax.identity())


@pytest.mark.parametrize("chunk", [None, 12])
def test_rings_of_the_window_give_the_logits_of_the_full_cache(chunk):
    full, whole = full_cache()
    logits, cache = run(kvjax.respect_windows(kvjax.identity()), chunk)
    # float32, and a ring holds its slots in another order.
    np.testing.assert_allclose(logits, full, atol=2e-5)
    assert [layer.segments[-1].pos.shape[-1] for layer in cache.layers] == [WINDOW, PROMPT + AFTER]
    last = np.array([PROMPT, PROMPT - 3]) + AFTER - 1
    expected = last[:, None] - np.arange(WINDOW)[::-1]
    np.testing.assert_array_equal(np.sort(cache.layers[0].segments[0].pos[:, 1]), expected)
    assert kvjax.nbytes(cache) < kvjax.nbytes(whole)


def test_local_layers_are_quantized_slot_by_slot_and_others_in_blocks_behind_an_exact_tail():
    cache = jax.eval_shape(lambda: run(kvjax.respect_windows(kvjax.methods.kivi(2, 8, 16)), compiled=jax.jit)[1])
    dtypes = [{x.dtype.name for x in jax.tree.leaves(layer)} for layer in cache.layers]
    assert dtypes == [{"int32", "uint32", "bfloat16"}, {"float32", "int32", "uint32", "bfloat16"}]
    ring = cache.layers[0].segments[-1]
    assert not ring.layout.grows and ring.by_slot and WINDOW <= ring.pos.shape[-1] < WINDOW + 16


def test_local_layers_are_left_alone_by_what_stores_nothing_anew():
    evict = kvjax.at_prefill_end(kvjax.evict(kvjax.scores.negative_key_norm(), 16))
    cache = jax.eval_shape(lambda: run(kvjax.respect_windows(evict), compiled=jax.jit)[1])
    assert [layer.segments[-1].pos.shape[-1] for layer in cache.layers] == [WINDOW, 16 + AFTER]
    assert cache.layers[0].segments[-1].is_plain


def test_an_eviction_that_acts_in_decoding_and_in_chunks_goes_on_beside_the_rings():
    evict = kvjax.every_step(kvjax.evict(kvjax.scores.negative_key_norm(), 16))
    logits, cache = run(kvjax.respect_windows(evict), chunk=12)
    assert np.isfinite(logits).all()
    held = [int(jnp.sum(layer.segments[-1].pos >= 0, axis=-1).max()) for layer in cache.layers]
    assert held == [WINDOW, 16]


@pytest.mark.parametrize("change", [dict(local_layers=(0, 1)), dict(local_layers=())])
def test_where_all_layers_are_alike_the_transform_gets_all(change):
    config = dataclasses.replace(CONFIG, **change)
    evict = kvjax.at_prefill_end(kvjax.evict(kvjax.scores.negative_key_norm(), 16))
    cache = jax.eval_shape(lambda: run(kvjax.respect_windows(evict), config=config, compiled=jax.jit)[1])
    assert [layer.segments[-1].pos.shape[-1] for layer in cache.layers] == [16 + AFTER] * 2


def test_a_ring_has_no_more_slots_than_there_can_be_tokens():
    config = dataclasses.replace(CONFIG, window=PROMPT + 30)
    cache = jax.eval_shape(lambda: run(kvjax.respect_windows(kvjax.identity()), config=config, compiled=jax.jit)[1])
    assert [layer.segments[-1].pos.shape[-1] for layer in cache.layers] == [PROMPT + AFTER] * 2


@pytest.mark.parametrize("method", [kvjax.methods.kivi(4, 8, 16), kvjax.methods.snapkv(5, window=2, kernel=3)])
def test_a_prompt_within_the_window_is_stored_as_beside_a_longer_one(method):
    """What a layer with a window stores does not depend on whether the batch holds a prompt longer than the window."""
    few = WINDOW - 2

    @functools.partial(quick_jit, static_argnames="T")
    def logits(params, lengths, *, T):
        step, transform = tiny_model.bind(params, CONFIG), kvjax.respect_windows(method)
        empty = tiny_model.empty(2, CONFIG)
        after = kvjax.prefill(step, transform, TOKENS[:, :T], lengths, empty, room=AFTER, call_tokens=AFTER)
        return kvjax.extend(step, transform, after, TOKENS[:, -AFTER:], jnp.full(2, AFTER))[1]

    params = tiny_model.params(CONFIG)
    beside, alone = (logits(params, jnp.array([few, T]), T=T) for T in (PROMPT, few))
    np.testing.assert_allclose(beside[0], alone[0], atol=2e-5)  # float32, slots lie in other places


def test_bounded_layers_are_those_with_a_window_where_others_have_none():
    step = tiny_model.bind(tiny_model.params(CONFIG), CONFIG)
    empty = tiny_model.empty(2, CONFIG)
    out = jax.eval_shape(lambda: step(TOKENS, jnp.zeros_like(TOKENS), empty, needs=kvjax.Needs(), last_only=True))
    seen = kvjax.Observation(out.layers, jnp.array([1, 1]), jnp.array([1, 1]), WINDOW)
    assert bounded_layers(seen) == (0,)
    assert all(bounded_layers(seen.replace(layers=(layer,) * 2)) == () for layer in seen.layers)


def test_a_learned_prefix_is_seen_from_beyond_the_window():
    """In a layer with a window, from every position; tokens are seen as far as the window says."""
    rng = np.random.default_rng(0)
    K, H, m, T, N = CONFIG.num_kv_heads, CONFIG.head_dim, 3, 20, CONFIG.num_heads
    slots, tokens = rng.normal(size=(2, K, m, H)), rng.normal(size=(2, 2, K, T, H))
    q, at, rope = rng.normal(size=(2, 4, N, H)), np.array([[1, 7, 15, 19], [0, 2, 8, 9]]), kvjax.Rope(jnp.zeros(H // 2))
    put = kvjax.prefix([(jnp.float32(slots[0]), jnp.float32(slots[1]))] * CONFIG.num_layers).schedule.before
    layer = put(tiny_model.empty(2, CONFIG)).layers[0]
    pos = np.broadcast_to(np.arange(T), (2, T))
    layer = layer.append(*(jnp.float32(x) for x in tokens), jnp.asarray(pos), rope)
    got = layer.attend(kvjax.Queries(jnp.float32(q), jnp.asarray(at), rope), window=WINDOW)
    for t in range(4):
        here = at[:, t : t + 1]
        held = np.concatenate([np.broadcast_to(here, (2, m)), pos], axis=1)[:, None].repeat(K, axis=1)
        both = (np.concatenate([np.stack([x, x]), y], axis=2) for x, y in zip(slots, tokens))
        want = attention(q[:, t : t + 1], *both, here, held, window=WINDOW)
        np.testing.assert_allclose(got.out[:, t], want.out[:, 0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.lse[:, t], want.lse[:, 0], rtol=1e-5, atol=1e-5)
