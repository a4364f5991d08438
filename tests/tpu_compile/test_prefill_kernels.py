"""The kernels of the prefill go through the TPU compilers: nothing as large as T x S, no copy of keys or values."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.tpu_compiler import GENERATIONS, compile_for
from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.block_attention import block_attention
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantize_pack import quantize_pack

pytestmark = pytest.mark.tpu_compile

MODELS = {"smollm2": (3, 3, 64), "llama_8b": (8, 4, 128)}  # K, G, H
TOPOLOGIES = [generation.topology for generation in GENERATIONS]
SLOW_BUT_ONE = [TOPOLOGIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TOPOLOGIES[1:])]


def _abstract(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def _compile(device, op, *arrays, **static) -> tuple:
    """The text of the program, and the analysis of its memory."""
    compiled = compile_for(device, functools.partial(op, implementation="mosaic_tpu", **static), *arrays)
    text = compiled.as_text()
    assert text.count("tpu_custom_call") == 1
    return text, compiled.memory_analysis()


def _buffers(text: str) -> set[tuple[int, ...]]:
    """The shapes in a program's text."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"[a-z]+[0-9]+\[([0-9,]+)\]", text)}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("model", MODELS)
def test_attention_mass(devices, model, topology):
    (K, G, H), T, S = MODELS[model], 48, 5120
    q, k = _abstract(jnp.bfloat16, 1, T, K * G, H), _abstract(jnp.bfloat16, 1, K, S, H)
    q_pos, k_pos, lse = _abstract(jnp.int32, 1, T), _abstract(jnp.int32, 1, K, S), _abstract(jnp.float32, 1, T, K * G)
    text, memory = _compile(devices(topology), attention_mass, q, k, q_pos, k_pos, lse)
    assert not any(T in shape and S in shape for shape in _buffers(text))
    assert f"bf16[1,{K},{S},{H}]" in text
    # Queries, positions and the result may be laid out anew; a copy of the keys takes at least their bytes.
    assert memory.temp_size_in_bytes < k.size * 2 / 2


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("model", MODELS)
def test_prefill_attention(devices, model, topology):
    # Compiling takes as long as a tile is large: several full ones for one generation only.
    (K, G, H), T = MODELS[model], 640 if topology == TOPOLOGIES[0] else 192
    q, k = _abstract(jnp.bfloat16, 1, T, K * G, H), _abstract(jnp.bfloat16, 1, K, T, H)
    text, memory = _compile(devices(topology), prefill_attention, q, k, k, _abstract(jnp.int32, 1, T))
    assert not any(shape.count(T) > 1 for shape in _buffers(text))
    # Queries and results are [T, N * H] for the kernel and [T, N, H] outside, where a model has the former too; heads
    # of 64 fill half the lanes.
    results = 4 * T * K * G * max(H, 128)
    assert memory.temp_size_in_bytes < 2 * results


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("axis, bits", [("channel", 2), ("token", 4)])
@pytest.mark.parametrize("model", MODELS)
def test_quantize_pack(devices, model, axis, bits, topology):
    (K, _, H), S = MODELS[model], 4096
    x, valid = _abstract(jnp.bfloat16, 1, K, S, H), _abstract(jnp.bool_, 1, K, S)
    how = dict(bits=bits, group=32, axis=axis, scale_dtype="bfloat16", in_row=128 // H)
    text, memory = _compile(devices(topology), quantize_pack, x, valid, **how)
    packed = K * S * H * bits // 8 + 2 * K * S * H // 32 * 2
    assert memory.output_size_in_bytes == pytest.approx(packed, rel=0.02)
    # Occupied slots as integers; codes before they are packed would be 8 bits or more.
    assert memory.temp_size_in_bytes <= 2 * 4 * valid.size
    assert not re.search(rf"(f32|[su]32|[su]8)\[1,{K},({S},{H}|{H},{S})\]", text)


@pytest.mark.parametrize("T, S", [(1, 2), (33, 7), (300, 129)])
def test_odd_lengths_compile(devices, T, S):
    device, at = devices(TOPOLOGIES[0]), lambda *shape: _abstract(jnp.bfloat16, *shape)
    pos = lambda *shape: _abstract(jnp.int32, *shape)
    lse = _abstract(jnp.float32, 2, T, 6)
    _compile(device, attention_mass, at(2, T, 6, 64), at(2, 2, S, 64), pos(2, T), pos(2, 2, S), lse)
    _compile(device, prefill_attention, at(2, T, 6, 64), at(2, 2, T, 64), at(2, 2, T, 64), pos(2, T))
    how = dict(bits=8, group=32, axis="token", scale_dtype="bfloat16")
    _compile(device, quantize_pack, at(2, 2, 4 * S, 64), _abstract(jnp.bool_, 2, 2, 4 * S), **how)


@pytest.mark.parametrize("topology", SLOW_BUT_ONE)
def test_block_attention(devices, topology):
    """At 131,072 tokens, of which a quarter of the blocks may be read: a table of 32 MiB stays in HBM."""
    K, G, H = MODELS["llama_8b"]
    T, blocks = 131072, 1024
    q, k = _abstract(jnp.bfloat16, 1, T, K * G, H), _abstract(jnp.bfloat16, 1, K, T, H)
    index = _abstract(jnp.int32, 1, K * G, blocks, blocks // 4)
    arrays = q, k, k, _abstract(jnp.int32, 1, T), index
    text, memory = _compile(devices(topology), block_attention, *arrays, block=128)
    assert not any(shape.count(T) > 1 for shape in _buffers(text))
    # Results are laid out anew where a model has [T, N * H]; beside them the table, with how many there are.
    assert memory.temp_size_in_bytes < q.size * 4 + 6 * index.size * 4
