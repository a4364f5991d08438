"""Every decode kernel goes through the real TPU compiler, and reads what is stored as it is stored."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_attention import PageRun, Rotation
from pallas_kernels.levels import nearest_levels
from pallas_kernels.shapes import LLAMA_8B
from pallas_kernels.shapes import SMOLLM2 as SHORT
from pallas_kernels.shapes import LowrankShape, QuantizedShape, RaggedQuantizedShape, RaggedShape
from pallas_kernels.words import words_in_row
from tests.pallas_kernels.attend import attend

pytestmark = pytest.mark.tpu_compile

TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1")
OP = functools.partial(attend, implementation="mosaic_tpu")
SMOLLM2 = dataclasses.replace(SHORT, S=32768)


def _quantized(shape, bits, key_axis="channel"):
    return OP, QuantizedShape(shape, bits, key_axis).abstract()[:5]


def _mixed(shape):
    """Levels of 3 bits as keys beside packed values of 4, both with norms."""
    q, _, v, q_pos, k_pos, _ = QuantizedShape(shape, 4).abstract()
    in_row, table = words_in_row(shape.H, shape.S // 32), jax.ShapeDtypeStruct((8,), jnp.float32)
    k = jax.eval_shape(functools.partial(nearest_levels, in_row=in_row), shape.abstract()[1], table)
    op = lambda q, k, v, q_pos, k_pos, k_gain, v_gain: OP(q, k, v, q_pos, k_pos, k_gain=k_gain, v_gain=v_gain)
    return op, (q, k, v, q_pos, k_pos, *[jax.ShapeDtypeStruct(k_pos.shape, jnp.float32)] * 2)


def _run(shape):
    """A run of the pages of a shape."""
    *args, pages = shape.abstract()
    rows = jax.ShapeDtypeStruct(pages.owner.shape[:1], jnp.int32)
    return OP, (*args, pages.replace(run=PageRun(rows, rows)))


def _packed_pages(shape, pages):
    return RaggedQuantizedShape(RaggedShape(shape, pages, 32), QuantizedShape(shape, 4))


def _unrotated(args):
    """Keys that are rotated when they are read, by ranks of their slots."""
    q, k, v, q_pos, k_pos = args[:5]
    return OP, (q, k, v, q_pos, k_pos, Rotation(jax.ShapeDtypeStruct((q.shape[3] // 2,), jnp.float32), k_pos))


PROGRAMS = {
    "dense": (OP, LLAMA_8B.abstract()[:5]),
    "int8": _quantized(LLAMA_8B, 8),
    "int4": _quantized(LLAMA_8B, 4),
    "int2": _quantized(LLAMA_8B, 2),
    "int2-token": _quantized(LLAMA_8B, 2, "token"),
    "mixed": _mixed(LLAMA_8B),
    "unrotated": _unrotated(LLAMA_8B.abstract()),
    "unrotated int4": _unrotated(QuantizedShape(LLAMA_8B, 4).abstract()),
    "unrotated int2-token": _unrotated(QuantizedShape(LLAMA_8B, 2, "token").abstract()),
    "ragged": (OP, RaggedShape(LLAMA_8B, 8 * 2048).abstract()),
    "packed pages": _run(_packed_pages(LLAMA_8B, 8 * 1024)),
    "run": _run(RaggedShape(dataclasses.replace(LLAMA_8B, B=2), 4 * 8 * 2048)),
    "lowrank": (OP, LowrankShape(LLAMA_8B, 64).abstract()),
    "joint": (OP, LowrankShape(LLAMA_8B, 256, joint=True).abstract()),
}
"""At 32,768 slots of the 8B shape."""

SMALL = {
    "dense": (OP, SMOLLM2.abstract()[:5]),
    "int4": _quantized(SMOLLM2, 4),
    "int2-token": _quantized(SMOLLM2, 2, "token"),
    "mixed": _mixed(SMOLLM2),
    "unrotated": _unrotated(SMOLLM2.abstract()),
    "unrotated int4": _unrotated(QuantizedShape(SMOLLM2, 4).abstract()),
    "ragged": (OP, RaggedShape(SMOLLM2, 3 * 2048).abstract()),
    "packed pages": _run(_packed_pages(SMOLLM2, 3 * 1024)),
    "lowrank": (OP, LowrankShape(SMOLLM2, 32).abstract()),
}
"""At 32,768 slots of 64 channels."""


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _cases():
    """Every kernel for every generation; in `make test` two of them, and of the others one for each generation."""
    for index, name in enumerate(PROGRAMS):
        for topology in TOPOLOGIES:
            fast = name in ("dense", "int4") or topology == TOPOLOGIES[index % len(TOPOLOGIES)]
            yield pytest.param(name, topology, marks=() if fast else pytest.mark.slow)


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


@pytest.mark.parametrize("topology", [TOPOLOGIES[0], pytest.param(TOPOLOGIES[3], marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL)
def test_64_channels(compiled, name, topology):
    function, args = SMALL[name]
    program = compiled(function, args, topology)
    assert "tpu_custom_call" in program.as_text()
    # 3 heads of positions are padded to 4, and the bases of the latents, 32, to 128 lanes.
    padding = (args[5].basis,) * 3 if name == "lowrank" else ()
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
