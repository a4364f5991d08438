"""Every method's prefill and decode programs go through the real TPU compiler, on a machine without a TPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import kvjax
from experiments.methods import load_method, method_names
from models.config import DecoderConfig
from models.decoder import bind, prompt_cache
from models.weights import abstract_params
from tests.fake_calibrations import Words, calibrate

pytestmark = pytest.mark.tpu_compile

SMOLLM2 = DecoderConfig("smollm2", 49152, 1, 576, 9, 3, 64, 1536)
LLAMA_8B = DecoderConfig("llama-8b", 128256, 2, 4096, 32, 8, 128, 14336, tied_embeddings=False)
PROMPT = 128  # sorting twice as many takes twice as long to compile
NEW_TOKENS = 64
ACROSS_LAYERS = {"minicache": 3, "xkv": 2}
"""Layers of the model for methods that need several."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled prefill and decode of one method, and the shapes between them."""

    prefill: jax.stages.Compiled
    decode: jax.stages.Compiled
    run: kvjax.Run


def compile_for(device, config, method, prompt, dtype=jnp.bfloat16, batch=1, decode_only=False) -> Programs:
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree
    )
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    params, tokens, lengths = abstract_params(config, dtype), int32(batch, prompt), int32(batch)

    def read(params, tokens, lengths):
        cache = prompt_cache(config, batch, dtype)
        return kvjax.prefill(
            bind(params, config), method.transform, tokens, lengths, cache, room=NEW_TOKENS, chunk=method.prefill_chunk
        )

    def write(params, run):
        return kvjax.generate(
            bind(params, config),
            method.transform,
            run,
            max_new_tokens=NEW_TOKENS,
            sampler=kvjax.Greedy(),
            key=jax.random.key(0),
            prompt_slots=prompt,
        )

    run = jax.eval_shape(read, params, tokens, lengths)
    prefill = None if decode_only else jax.jit(read).lower(*place((params, tokens, lengths))).compile()
    decode = jax.jit(write, donate_argnums=1).lower(*place((params, run))).compile()
    return Programs(prefill, decode, run)


@pytest.mark.parametrize("name", method_names())
def test_prefill_and_decode_compile_for_v5e(devices, name):
    config = dataclasses.replace(SMOLLM2, num_layers=ACROSS_LAYERS.get(name, 1))
    method = load_method(name, budget=0.5, calibrate=calibrate(config), tokenizer=Words())
    programs = compile_for(devices("v5e:2x2"), config, method, PROMPT)
    for program in (programs.prefill, programs.decode):
        assert program.memory_analysis().argument_size_in_bytes > 0
    # The dense tail at least, where a method has one, is read by a kernel.
    assert "tpu_custom_call" in programs.decode.as_text()
    # The loop's cache is the donated one.
    assert programs.decode.memory_analysis().alias_size_in_bytes >= kvjax.nbytes(programs.run.cache)


@pytest.mark.parametrize("topology", ["v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_evict_and_quantize_compiles_for_other_generations(devices, topology):
    method = load_method("snapkv_int4", budget=0.5)
    programs = compile_for(devices(topology), SMOLLM2, method, PROMPT)
    assert programs.decode.memory_analysis().alias_size_in_bytes > 0


@pytest.mark.parametrize("name", ["full", "int4", "h2o"])
def test_long_8b_decode_arguments_are_the_cache(devices, name):
    """32,768 slots of the 8B shape: TPU tiles pad little, and a packed cache is never dequantized as a whole."""
    method = load_method(name, budget=0.5)
    programs = compile_for(devices("v5e:2x2"), LLAMA_8B, method, 32768, decode_only=True)
    memory = programs.decode.memory_analysis()
    cache = kvjax.nbytes(programs.run.cache)
    weights = kvjax.nbytes(abstract_params(LLAMA_8B, jnp.bfloat16))
    segments = sum(len(layer.segments) for layer in programs.run.cache.layers)
    kernels = programs.decode.as_text().count('custom_call_target="tpu_custom_call"')
    assert kernels >= segments * (2 if name == "int4" else 1)  # int4: the packed body, and its tail
    assert memory.argument_size_in_bytes - weights == pytest.approx(cache, rel=0.05)
    if name == "int4":
        slots = programs.run.cache.layers[0].segments[-1].body.pos.shape[-1]
        dequantized = rf"(?:f32|bf16)\[1,8,{slots}[0-9,]*128\]"
        assert not re.search(dequantized, programs.decode.as_text())
