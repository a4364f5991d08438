"""A prefill that compresses never holds the whole uncompressed cache: the compiler's own count of temporaries."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import methods
from models.weights import abstract_params
from tests.fake_calibrations import calibrate
from tests.kvjax import tiny_model
from tests.quick_jit import quick_jit

T = 1024
DENSE_LAYER = 2 * T * tiny_model.CONFIG.num_kv_heads * tiny_model.CONFIG.head_dim * 4  # keys and values, bytes
FEW, MANY = 4, 7  # layers; with three, some methods never hold what they hold of two layers in the middle


def _peak(build, layers: int) -> int:
    """Bytes of temporaries of a prefill with compression, beside its result."""
    config = dataclasses.replace(tiny_model.CONFIG, num_layers=layers)
    method = build(calibrate(config))

    def program(params, tokens, lengths, cache):
        return kvjax.prefill(tiny_model.bind(params, config), method, tokens, lengths, cache, room=8)

    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    cache = jax.eval_shape(lambda: tiny_model.empty(1, config))
    args = abstract_params(config, jnp.float32), int32(1, T), int32(1), cache
    return quick_jit(program).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "build",
    [
        lambda data: methods.snapkv(0.25, window=16),
        lambda data: methods.kivi(4, group=16, residual=32),
        pytest.param(lambda data: methods.adakv_snapkv(0.25, window=16), marks=pytest.mark.slow),
        pytest.param(lambda data: methods.matryoshka_pca(data("matryoshka_pca", None), 8, 8), marks=pytest.mark.slow),
        lambda data: methods.duoattention(data("duoattention", None), sinks=4, recent=64),
        pytest.param(lambda data: methods.h2o(0.25), marks=pytest.mark.slow),
        pytest.param(lambda data: methods.d2o(0.25, whole=()), marks=pytest.mark.slow),
        lambda data: methods.kvmerger(0.25, whole=()),
    ],
    ids=["snapkv", "kivi", "adakv", "matryoshka", "duoattention", "h2o", "d2o", "kvmerger"],
)
def test_an_added_layer_costs_less_than_half_of_its_dense_keys_and_values(build):
    """So dense keys and values are those of a few layers at a time, beside the compressed cache."""
    assert _peak(build, MANY) - _peak(build, FEW) < (MANY - FEW) * DENSE_LAYER / 2


def test_without_compression_the_cache_is_the_result_and_no_second_copy():
    full = lambda data: methods.full()
    assert _peak(full, MANY) - _peak(full, FEW) < DENSE_LAYER
