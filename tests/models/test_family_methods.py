"""The flagship methods on every family, layers with a sliding window and softly capped logits included."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from models.decoder import bind, forward, prompt_cache
from models.families import read_config
from models.weights import abstract_params, build_params
from tests.fake_calibrations import calibrate
from tests.golden.tiny_weights import ROWS, weights
from tests.models.test_families import CHECKPOINTS
from tests.quick_jit import quick_jit

PROMPT, AFTER = 20, 3
LONG = 124  # tokens, of which a codebook is a small part
LENGTHS = np.array([PROMPT, PROMPT - 4])
STRUCTURES = sorted(set(CHECKPOINTS) - {"qwen2_yarn"})  # another qwen2

_all = PROMPT + AFTER
# Each as it compresses, and where it has them with settings that lose nothing of so short a prompt; of a calibration.
METHODS = {
    "snapkv": lambda of: (kvjax.methods.snapkv(8, window=4), kvjax.methods.snapkv(_all, window=4)),
    "h2o": lambda of: (kvjax.methods.h2o(8), kvjax.methods.h2o(_all)),
    "streamingllm": lambda of: (
        kvjax.methods.streamingllm(8, sinks=2),
        kvjax.methods.streamingllm(_all, sinks=2, reindex=False),
    ),
    "adakv_snapkv": lambda of: (
        kvjax.methods.adakv_snapkv(8, window=4, page=4),
        kvjax.methods.adakv_snapkv(_all, window=4, page=4),
    ),
    "kvmerger": lambda of: (kvjax.methods.kvmerger(8, whole=()), kvjax.methods.kvmerger(_all, whole=())),
    "int4": lambda of: (kvjax.methods.kivi(4, 8, 8), kvjax.methods.kivi(4, 8, 32)),
    "kivi2": lambda of: (kvjax.methods.kivi(2, 8, 16), kvjax.methods.kivi(2, 8, 32)),
    "million": lambda of: (kvjax.methods.million(of("million"), 8), None),
    "think": lambda of: (kvjax.methods.think(0.5, window=4), kvjax.methods.think(0.0, window=4)),
    "matryoshka_pca": lambda of: (
        kvjax.methods.matryoshka_pca(of("matryoshka_trained"), 0.5, 0.5),  # without means, as it is measured
        kvjax.methods.matryoshka_pca(of("matryoshka_trained"), 1.0, 1.0),
    ),
    "xkv": lambda of: (kvjax.methods.xkv(2, 4, 4), kvjax.methods.xkv(2, 1.0, 1.0)),
    "duoattention": lambda of: (kvjax.methods.duoattention(of("duoattention"), 1.0, sinks=2, recent=4), None),
}
_REFUSED = {("deepseek_v2", method) for method in ("think", "matryoshka_pca", "million")}  # values apart from keys


def logits_after_prompt(params, config, transform, tokens, lengths):
    """f32[2, AFTER, V], of the tokens after two prompts of unequal length, one by one; and the cache."""
    T = tokens.shape[1] - AFTER
    # The tiny checkpoints know few positions, and rotary ones go beyond them.
    step = bind(params, config, max_positions=config.learned_positions or tokens.shape[1])
    transform = kvjax.respect_windows(transform)
    run = kvjax.prefill(step, transform, tokens[:, :T], lengths, prompt_cache(config, 2), room=AFTER)

    def one(run, i):
        token = jnp.take_along_axis(tokens, lengths[:, None] + i, axis=1)
        run, logits = kvjax.extend(step, transform, run, token, jnp.ones(2, int))
        return run, logits[:, 0]

    run, logits = jax.lax.scan(one, run, jnp.arange(AFTER))
    return logits.swapaxes(0, 1), run.cache


@functools.cache
def config_of(name):
    """One layer of each kind is enough here."""
    config = read_config(name, CHECKPOINTS[name]["config"])
    mixed = 0 < len(config.local_layers) < config.num_layers or config.dense_layers
    return dataclasses.replace(config, num_layers=2 if mixed else 1, local_layers=config.local_layers[:1])


def pair_of(method, config):
    """An entry of `METHODS`, with calibrations of the layers that `kvjax.respect_windows` leaves to it."""
    others = config.num_layers - len(config.local_layers) or config.num_layers
    make = calibrate(dataclasses.replace(config, num_layers=others))
    return METHODS[method](lambda recipe: make(recipe, None))


def _pairs():
    """Every method with every family; every sixth pair, which has every family and every method, is fast."""
    for (i, name), (j, method) in itertools.product(enumerate(STRUCTURES), enumerate(METHODS)):
        if (name, method) not in _REFUSED:
            yield pytest.param(name, method, marks=() if (i + j) % 6 == 0 else pytest.mark.slow)


@pytest.mark.parametrize("name, method", list(_pairs()))
def test_every_method_compresses_every_family(name, method):
    config = config_of(name)
    config = dataclasses.replace(config, learned_positions=LONG if config.learned_positions else 0)
    transform, _ = pair_of(method, config)
    params = abstract_params(config, jnp.float32)
    tokens, lengths = jax.ShapeDtypeStruct((2, LONG), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    of = lambda *arrays: logits_after_prompt(arrays[0], config, transform, *arrays[1:])
    logits, cache = jax.eval_shape(of, params, tokens, lengths)
    assert logits.shape == (2, AFTER, config.vocab_size)
    assert kvjax.nbytes(cache) < kvjax.nbytes(jax.eval_shape(lambda: prompt_cache(config, 2).reserve(LONG)))


@pytest.mark.parametrize(
    "name, method",
    [
        ("gemma2", "snapkv"),
        ("phi4_mini", "think"),
        ("opt", "int4"),
        ("deepseek_v2", "xkv"),
        ("gemma3", "matryoshka_pca"),
    ],
)
def test_methods_that_lose_nothing_give_the_logits_of_the_full_cache(name, method):
    """Gemma 2 has capped logits and local layers, Phi-4-mini rotates a part of each head, OPT nothing.

    The keys of DeepSeek-V2 are its values.
    """
    tokens = jnp.int32([row[: PROMPT + AFTER] for row in ROWS])
    run = quick_jit(logits_after_prompt, static_argnums=(1, 2))
    _, lossless = pair_of(method, config_of(name))
    logits, _ = run(params_of(name), config_of(name), lossless, tokens, jnp.asarray(LENGTHS))
    # float32, summed over slots in another order.
    np.testing.assert_allclose(logits, full_logits(name), atol=5e-5)


@functools.cache
def params_of(name):
    return build_params(config_of(name), weights(CHECKPOINTS[name]["shapes"]).__getitem__, jnp.float32)


@functools.cache
def full_logits(name):
    """f32[2, AFTER, V] of one call for the whole text."""
    ids = jnp.int32([row[: PROMPT + AFTER] for row in ROWS])
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    logits, _ = quick_jit(forward, static_argnums=1)(
        params_of(name), config_of(name), ids, positions, prompt_cache(config_of(name), 2)
    )
    return np.stack([np.asarray(row)[n : n + AFTER] for row, n in zip(logits, LENGTHS)])
