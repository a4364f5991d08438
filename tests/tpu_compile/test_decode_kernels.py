"""Every decode kernel goes through the real TPU compiler, and reads what is stored as it is stored."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.lowrank_decode_attention import lowrank_decode_attention
from pallas_kernels.quantized_decode_attention import quantized_decode_attention
from pallas_kernels.ragged_decode_attention import PageRun, ragged_decode_attention
from pallas_kernels.ragged_quantized_decode_attention import ragged_quantized_decode_attention
from pallas_kernels.shapes import LLAMA_8B, LowrankShape, QuantizedShape, RaggedQuantizedShape, RaggedShape
from pallas_kernels.shapes import SMOLLM2 as SHORT

pytestmark = pytest.mark.tpu_compile

TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1")
TPU = dict(implementation="mosaic_tpu")
SMOLLM2 = dataclasses.replace(SHORT, S=32768)


def _quantized(shape, bits, key_axis="channel"):
    op = functools.partial(quantized_decode_attention, bits=bits, key_axis=key_axis, **TPU)
    return op, QuantizedShape(shape, bits, key_axis).abstract()[:5]


def _ragged(shape, pages):
    return functools.partial(ragged_decode_attention, kv_heads=shape.K, **TPU), RaggedShape(shape, pages).abstract()


def _packed_pages(shape, pages):
    """A run of packed pages of 32 slots."""
    shape = RaggedQuantizedShape(RaggedShape(shape, pages, 32), QuantizedShape(shape, 4))
    op = functools.partial(ragged_quantized_decode_attention, kv_heads=shape.pages.decode.K, bits=4, **TPU)
    rows = jax.ShapeDtypeStruct((shape.pages.decode.B,), jnp.int32)
    return lambda *args: op(*args[:-1], run=args[-1]), (*shape.abstract(), PageRun(rows, rows))


def _unrotated(shape):
    """Keys that are rotated when they are read, by ranks of their slots."""
    q, k, v, q_pos, k_pos, _ = shape.abstract()
    op = lambda q, k, v, q_pos, k_pos, at, inv_freq: lowrank_decode_attention(
        q, k, v, None, inv_freq, q_pos, k_pos, at=at, **TPU
    )
    return op, (q, k, v, q_pos, k_pos, k_pos, jax.ShapeDtypeStruct((shape.H // 2,), jnp.float32))


def _run_of_pages(shape, pages):
    op, args = _ragged(shape, pages)
    rows = jax.ShapeDtypeStruct((shape.B,), jnp.int32)
    return lambda *args: op(*args[:-1], run=args[-1]), (*args, PageRun(rows, rows))


PROGRAMS = {
    "dense": (functools.partial(decode_attention, **TPU), LLAMA_8B.abstract()[:5]),
    "int8": _quantized(LLAMA_8B, 8),
    "int4": _quantized(LLAMA_8B, 4),
    "int2": _quantized(LLAMA_8B, 2),
    "int2-token": _quantized(LLAMA_8B, 2, "token"),
    "unrotated": _unrotated(LLAMA_8B),
    "ragged": _ragged(LLAMA_8B, 8 * 2048),
    "packed pages": _packed_pages(LLAMA_8B, 8 * 1024),
    "run": _run_of_pages(dataclasses.replace(LLAMA_8B, B=2), 4 * 8 * 2048),
    "lowrank": (functools.partial(lowrank_decode_attention, **TPU), LowrankShape(LLAMA_8B, 64).abstract()),
    "joint": (functools.partial(lowrank_decode_attention, **TPU), LowrankShape(LLAMA_8B, 256, joint=True).abstract()),
}
"""At 32,768 slots of the 8B shape."""

SMALL = {
    "dense": (functools.partial(decode_attention, **TPU), SMOLLM2.abstract()[:5]),
    "int4": _quantized(SMOLLM2, 4),
    "int2-token": _quantized(SMOLLM2, 2, "token"),
    "unrotated": _unrotated(SMOLLM2),
    "ragged": _ragged(SMOLLM2, 3 * 2048),
    "packed pages": _packed_pages(SMOLLM2, 3 * 1024),
    "lowrank": (functools.partial(lowrank_decode_attention, **TPU), LowrankShape(SMOLLM2, 32).abstract()),
}
"""At 32,768 slots of 64 channels."""


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _cases():
    """Every kernel for every generation; what it is compiled for otherwise, for one of them each."""
    for name in ("dense", "int4", "ragged", "lowrank"):
        yield from ((name, topology) for topology in TOPOLOGIES)
    yield from zip(("int8", "int2", "int2-token", "joint"), TOPOLOGIES)
    yield from zip(["run"] * 4 + ["unrotated"] * 4 + ["packed pages"] * 4, TOPOLOGIES * 3)


@pytest.mark.parametrize("name, topology", list(_cases()))
def test_bytes_are_read_as_they_are_stored(compiled, name, topology):
    function, args = PROGRAMS[name]
    program = compiled(function, args, topology)
    memory, text = program.memory_analysis(), program.as_text()
    assert "tpu_custom_call" in text
    assert memory.argument_size_in_bytes == pytest.approx(nbytes(args), rel=0.02)
    # Queries and results in tiles of 8 x 128, and bases and means in the queries' dtype and tiles, are all else that
    # is made: less than 2 MB.
    assert memory.temp_size_in_bytes < 0.01 * nbytes(args) + 2**21
    assert largest_result(text) < 0.02 * nbytes(args)


@pytest.mark.parametrize("topology", TOPOLOGIES[::3])
@pytest.mark.parametrize("name", SMALL)
def test_64_channels(compiled, name, topology):
    function, args = SMALL[name]
    program = compiled(function, args, topology)
    assert "tpu_custom_call" in program.as_text()
    # 3 heads of positions are padded to 4, and the bases of the latents, 32, to 128 lanes.
    padding = args[3:4] * 3 if name == "lowrank" else ()
    memory = program.memory_analysis()
    assert nbytes(args) <= memory.argument_size_in_bytes < 1.02 * (nbytes(args) + nbytes(padding))
    assert memory.temp_size_in_bytes < 0.01 * nbytes(args) + 2**19
    # Slots are minor in HBM and in the kernel, or words fill the lanes: no copy but of a basis, and of the owners of
    # pages, which are spread to one for 4 slots, the same for all layers.
    assert largest_result(program.as_text()) < (0.04 if name == "packed pages" else 0.02) * nbytes(args)


def largest_result(text: str) -> int:
    """Bytes of the largest array that the program computes or lays out anew, in any memory.

    A `copy-done` is not one: it brings an operand into VMEM as it is, ahead of the kernel.
    """
    sizes = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}
    found = [0]
    for line in text[text.index("ENTRY") :].splitlines():
        match = re.search(r"= (\w+)\[([\d,]+)\]\{[^}]*\} (?!parameter|bitcast|get-tuple-element|copy-done)", line)
        if match and match[1] in sizes:
            found.append(sizes[match[1]] * math.prod(map(int, match[2].split(","))))
    return max(found)
