"""Pages in host memory: what is computed is the same, and only what is chosen is copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import indices
from tests.kvjax import tiny_model
from tests.kvjax.slot_arrays import ROPE, H, K, T, seen_of, slots_cache
from tests.quick_jit import quick_jit

LENGTHS, NEW = (20, 14), 9


def _method(hosted, bits=None):
    select = kvjax.select(indices.Bounds(), read=12, page=8, residual=8, dense_layers=(), each=1, hosted=hosted)
    return select if bits is None else kvjax.chain(select, kvjax.quantize(bits, key_group=4, value_group=4, residual=8))


@quick_jit
def _decode(layer, k, v, raw):
    def one(layer, x):
        k, v, raw, i = x
        pos = jnp.int32(LENGTHS)[:, None] + i
        layer = layer.append(k, v, pos, ROPE)
        return layer, layer.attend(kvjax.Queries(raw, pos, ROPE, ahead=jnp.zeros((1, 1), jnp.int32))).out

    return jax.lax.scan(one, layer, (k, v, raw, jnp.arange(NEW)))


def _run(method):
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, len(LENGTHS), K, T, H)).astype(np.float32)

    def start(cache):
        return method.init(cache, seen_of(LENGTHS))[0].reserve(NEW)

    cache = quick_jit(start)(slots_cache(k, LENGTHS, v))
    new_k, new_v = rng.normal(size=(2, NEW, len(LENGTHS), K, 1, H)).astype(np.float32)
    raw = rng.normal(size=(NEW, len(LENGTHS), 1, 2 * K, H)).astype(np.float32)
    layer, out = _decode(cache.layers[0], new_k, new_v, raw)
    return cache, layer, out


@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_hosted_pages_give_what_pages_on_the_device_give_in_a_scan(bits):
    (_, layer, out), (cache, hosted, hosted_out) = _run(_method(False, bits)), _run(_method(True, bits))
    np.testing.assert_array_equal(hosted_out, out)
    for a, b in zip(jax.tree.leaves(layer), jax.tree.leaves(hosted), strict=True):
        np.testing.assert_array_equal(a, b)
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
    for segment in (cache.layers[0].segments[0], hosted.segments[0]):
        assert "pinned_host" in kinds(segment.body.stored)
        assert "pinned_host" not in kinds((segment.tail, segment.body.summary, segment.body.pos))
    on_host = [x.nbytes for x in jax.tree.leaves(cache) if x.sharding.memory_kind == "pinned_host"]
    assert kvjax.bytes_on_host(cache) == sum(on_host) > 0
    assert kvjax.bytes_on_host(jax.eval_shape(lambda: cache)) == sum(on_host)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4])
def test_a_decoder_generates_the_same_tokens(bits):
    def tokens(hosted):
        def program(params, prompt):
            step, method = tiny_model.bind(params), _method(hosted, bits)
            run = kvjax.prefill(step, method, prompt, jnp.array([60, 41]), tiny_model.empty(2), room=20)
            how = dict(max_new_tokens=20, sampler=kvjax.Greedy(), key=jax.random.key(0))
            return kvjax.generate(step, method, run, **how).tokens

        return quick_jit(program)(tiny_model.params(), tiny_model.prompt(2, 60))

    np.testing.assert_array_equal(tokens(True), tokens(False))


def test_an_index_that_reads_all_keys_is_refused():
    method = kvjax.select(indices.Exact(), read=12, page=4, dense_layers=(), hosted=True)
    k = np.zeros((len(LENGTHS), K, T, H), np.float32)
    with pytest.raises(ValueError, match="index must not be Exact"):
        method.init(slots_cache(k, LENGTHS, k), seen_of(LENGTHS))
