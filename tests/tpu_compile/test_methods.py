"""Every method's prefill and decode programs go through the real TPU compiler, on a machine without a TPU."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import kvjax
from experiments.methods import load_method, method_names
from experiments.tpu_compiler import GENERATIONS
from kvjax.transforms.merge import Moves, move
from models.config import DecoderConfig
from models.decoder import bind
from models.weights import abstract_params
from tests.fake_calibrations import Words, calibrate

pytestmark = pytest.mark.tpu_compile

SMOLLM2 = DecoderConfig("smollm2", 49152, 1, 576, 9, 3, 64, 1536, max_positions=65536)
LLAMA_8B = DecoderConfig("llama-8b", 128256, 2, 4096, 32, 8, 128, 14336, max_positions=2**20, tied_embeddings=False)
MODELS = {"smollm2": SMOLLM2, "llama_8b": dataclasses.replace(LLAMA_8B, num_layers=1)}
TOPOLOGIES = [generation.topology for generation in GENERATIONS]
PROMPT = 80  # sorting twice as many takes twice as long to compile
NEW_TOKENS = 64
ACROSS_LAYERS = {"minicache": 3, "xkv": 2}
"""Layers of the model for methods that need several."""
LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
"""Compiled in two thirds of the time: for what is asked whether it compiles, not how well."""
FAST = [
    # Every kind of slots is read and written,
    ("decode", "full"),
    ("decode", "int4"),
    ("decode", "streamingllm"),
    ("decode", "adakv_snapkv"),
    ("decode", "kvzip_int4"),
    ("decode", "gear"),
    ("decode", "rotatekv"),
    ("decode", "cskv"),
    # and is made from dense ones.
    ("prefill", "snapkv_int4"),
    ("prefill", "cake"),
]
"""What `make test` compiles, each at one shape for one generation in turn, with the least effort."""


def _cases():
    """Both programs of every method at both shapes for every generation; those of `FAST`, for one each, are fast."""
    everything = list(itertools.product(("prefill", "decode"), MODELS, TOPOLOGIES))
    fast = dict(zip(FAST, itertools.cycle(itertools.product(MODELS, TOPOLOGIES))))
    for name, (program, *where) in itertools.product(method_names(), everything):
        here = fast.get((program, name)) == tuple(where)
        yield pytest.param(name, program, *where, here, marks=() if here else pytest.mark.slow)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled prefill and decode of one method, and the shapes between them."""

    prefill: jax.stages.Compiled | None
    decode: jax.stages.Compiled | None
    run: kvjax.Run


def compile_for(device, config, method, prompt, *, programs=("prefill", "decode"), options=None) -> Programs:
    dtype, batch = jnp.bfloat16, 1
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree
    )
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    params, tokens, lengths = abstract_params(config, dtype), int32(batch, prompt), int32(batch)

    def lm(params):
        return kvjax.bind(bind(params, config), method.transform)

    def read(params, tokens, lengths):
        return lm(params).prefill(tokens, lengths, room=NEW_TOKENS, chunk=method.prefill_chunk)

    def write(params, run):
        return lm(params).generate(run, NEW_TOKENS)

    run = jax.eval_shape(read, params, tokens, lengths)
    compiled = lambda function, *args, **how: jax.jit(function, **how).lower(*place(args)).compile(options)
    return Programs(
        compiled(read, params, tokens, lengths) if "prefill" in programs else None,
        compiled(write, params, run, donate_argnums=1) if "decode" in programs else None,
        run,
    )


@pytest.mark.parametrize("name, program, model, topology, fast", list(_cases()))
def test_every_method_compiles(devices, name, program, model, topology, fast):
    config = dataclasses.replace(MODELS[model], num_layers=ACROSS_LAYERS.get(name, 1))
    method = load_method(name, budget=0.5, calibrate=calibrate(config), tokenizer=Words())
    options = LEAST_EFFORT if fast else None
    programs = compile_for(devices(topology), config, method, PROMPT, programs=(program,), options=options)
    cache = kvjax.nbytes(programs.run.cache)
    if program == "prefill":
        assert programs.prefill.memory_analysis().output_size_in_bytes >= cache
    else:
        # The dense tail at least, where a method has one, is read by a kernel.
        assert "tpu_custom_call" in programs.decode.as_text()
        # The loop's cache is the donated one.
        assert programs.decode.memory_analysis().alias_size_in_bytes >= cache


@pytest.mark.parametrize(
    "name, prompt",
    # A cache is rounded up to whole tiles where that adds less than one slot in 128, packed ones from 32,768 slots on.
    [
        pytest.param("full", 32768, marks=pytest.mark.slow),
        ("int4", 32768),
        pytest.param("kivi2", 32768, marks=pytest.mark.slow),
        pytest.param("h2o", 16384, marks=pytest.mark.slow),
        pytest.param("streamingllm", 32768, marks=pytest.mark.slow),
    ],
)
def test_a_long_8b_decode_holds_the_cache_and_little_else(devices, name, prompt):
    """TPU tiles pad little, nothing is copied, and a packed cache is never dequantized as a whole."""
    method = load_method(name, budget=0.5)
    programs = compile_for(devices("v5e:2x2"), LLAMA_8B, method, prompt, programs=("decode",))
    memory, text = programs.decode.memory_analysis(), programs.decode.as_text()
    cache, layer = kvjax.nbytes(programs.run.cache), programs.run.cache.layers[0]
    weights = kvjax.nbytes(abstract_params(LLAMA_8B, jnp.bfloat16))
    packed = [segment.body for segment in layer.segments if hasattr(segment, "body")]
    kernels = text.count('custom_call_target="tpu_custom_call"')
    assert kernels >= LLAMA_8B.num_layers * (len(layer.segments) + len(packed))  # of packed bodies, and of their tails
    assert memory.argument_size_in_bytes - weights == pytest.approx(cache, rel=0.02)
    # 2 to 3.3 MB a layer at 1,024, 32,768 and 65,536 slots alike: of the step, not of the cache.
    assert memory.temp_size_in_bytes < LLAMA_8B.num_layers * 2**22
    for body in packed:
        slots = body.pos.shape[-1]
        assert not re.search(rf"(?:f32|bf16)\[(?:1,8,{slots}[0-9,]*|{8 * slots}),128\]", text)


@pytest.mark.parametrize("name", ["razorattention", pytest.param("kvzip_int4", marks=pytest.mark.slow)])
def test_odd_rings_and_packed_pages_are_not_copied(devices, name):
    """One narrow layer with the KV heads of 8B, at a length whose arrays do not fit VMEM, where a copy would hide."""
    config = dataclasses.replace(MODELS["llama_8b"], vocab_size=1024, width=1024, ffn_width=1024)
    method = load_method(name, budget=0.5, calibrate=calibrate(config), tokenizer=Words())
    programs = compile_for(devices("v5e:2x2"), config, method, 524288, programs=("decode",))
    cache = kvjax.nbytes(programs.run.cache)
    # 2.6 and 3.3 MB beside 1,082 and 344: of the step, and numbers of slots.
    assert programs.decode.memory_analysis().temp_size_in_bytes < 0.01 * cache + 2**22 < 0.03 * cache


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "kivi2", "duoattention"])
def test_a_prompt_in_chunks_is_stored_compressed_from_the_first_one_on(devices, name):
    """Twice as long a prompt takes what its compressed cache takes, and at most two layers of an exact chunk.

    And once the scales of one layer's keys, a quarter of its codes at 4 bits, which XLA lays out anew for the loop.
    """
    config = dataclasses.replace(MODELS["llama_8b"], num_layers=2, vocab_size=1024, width=512, ffn_width=512)
    method = load_method(name, budget=0.5, calibrate=calibrate(config), tokenizer=Words())
    method, peaks, caches = dataclasses.replace(method, prefill_chunk=512), [], []
    for prompt in (32768, 65536):
        programs = compile_for(devices("v5e:2x2"), config, method, prompt, programs=("prefill",))
        memory = programs.prefill.memory_analysis()
        peaks.append(memory.temp_size_in_bytes + memory.output_size_in_bytes)
        caches.append(kvjax.nbytes(programs.run.cache))
    exact = 2 * 512 * 8 * 128 * 2 * 2  # two layers of a chunk: 8 heads of 128 channels, keys and values in bfloat16
    scales = 0 if name == "duoattention" else 32768 // 32 * 8 * 2 * 128 * 2  # and zeros, of groups of 32 tokens
    assert peaks[1] - peaks[0] < caches[1] - caches[0] + exact + scales
    assert caches[1] - caches[0] < 0.6 * 2 * 32768 * 8 * 128 * 2 * 2  # of the dense slots


def test_merging_a_few_slots_copies_nothing(devices):
    """Up to eight, as a decoding step gives up: room is made in tiles of eight."""
    at = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices("v5e:2x2")))
    slots, few = (1, 8, 262144), (1, 8, 8)
    kv = at((*slots, 128), jnp.bfloat16)
    segment = kvjax.Segment.of(kv, kv, at(slots, jnp.int32))
    moves = Moves(at(few, jnp.int32), at(few, jnp.bool_), at(few, jnp.int32), at(few, jnp.float32))
    memory = jax.jit(move, donate_argnums=0).lower(segment, moves).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.01 * kvjax.nbytes(segment)


@pytest.mark.parametrize("name, kernels", [("full", {"write_slot"}), ("int4", {"quantize_pack"})])
def test_heads_of_64_are_written_where_they_lie(devices, name, kernels):
    """Dense slots lie along lanes there, two words in a row; other layouts would copy the cache at every step."""
    programs = compile_for(devices("v6e:2x2"), SMOLLM2, load_method(name, budget=0.5), 32768, programs=("decode",))
    assert all(kernel in programs.decode.as_text() for kernel in kernels)
    # 25 or 8 MB of cache; see above for what a step needs.
    assert programs.decode.memory_analysis().temp_size_in_bytes < 2**21 < kvjax.nbytes(programs.run.cache) / 3
