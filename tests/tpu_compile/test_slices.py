"""Decoding of very long contexts on whole slices: compiled by the planner, with nothing of the cache gathered."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import kvjax
from experiments import planner, shapes
from experiments.methods import load_method
from experiments.tpu_compiler import compile_only_devices
from kvjax import sharding
from tests.kvjax.encoders import affine

pytestmark = pytest.mark.tpu_compile


@pytest.mark.parametrize(
    "topology, mesh, method, context",
    [
        ("v5e:16x16", "seq:32,model:8", "int4", 2**20),
        pytest.param("v5e:16x16", "seq:64,model:4", "kivi2", 2**20, marks=pytest.mark.slow),
        pytest.param("v5p:8x8x8", "seq:64,model:8", "int4", 10 * 2**20, marks=pytest.mark.slow),
    ],
)
def test_a_step_over_millions_of_tokens_reads_its_own_shard(devices, topology, mesh, method, context):
    """Two of 32 layers: every layer is the same program, and what is asserted is per layer."""
    config = dataclasses.replace(shapes.read_model("llama3_1_8b", context), num_layers=2)
    grid = sharding.make_mesh(mesh, compile_only_devices(topology))
    of, method = planner.Planner(planner.Setting(config, context, 1, grid)), load_method(method, budget=0.25)
    with sharding.use_mesh(grid):
        run = of.run(method, context)
        decode, text = of.decode(method, run)
    cache_bytes, weight_bytes = planner.bytes_on_device((run.cache, run.state)), of.weight_bytes
    assert decode.needs_bytes is None
    assert decode.argument_bytes == pytest.approx(cache_bytes + weight_bytes, rel=0.05)
    # The cache alone; what has two heads on a chip is padded to tiles of eight rows where it has no other axis.
    assert decode.argument_bytes - weight_bytes == pytest.approx(cache_bytes, rel=0.08)
    chips = math.prod(int(n.split(":")[1]) for n in mesh.split(","))
    dense = 2 * 8 * context * (2 * 128 * 2 + 4) / chips
    assert cache_bytes < dense * (0.40 if "4" in method.name else 0.35)
    assert decode.temporary_bytes < 0.1 * cache_bytes + 2**24
    assert set(decode.collectives) <= {"all-reduce", "all-gather", "collective-permute"}
    # What is gathered is of the token's activations: nothing with an axis of the context's slots or of a shard's.
    gathered = [
        math.prod(int(n) for n in shape.split(","))
        for line in re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
        for shape in re.findall(r"\[([\d,]+)\]", line)
    ]
    assert max(gathered, default=0) <= 4096
    sent = sum(size for _, size in decode.collectives.values())
    assert sent < 2**20  # of 40 MiB of cache and more


def test_layers_are_ordered_one_after_the_other(devices):
    """What the end of a prompt makes room for, where the slots of a layer lie on four chips: less than one layer."""
    grid, layers = sharding.make_mesh("seq:4,model:2", compile_only_devices("v5e:2x4")), 4
    encode = functools.partial(affine, bits=4, key_group=32, value_group=32, block=32)
    with sharding.use_mesh(grid):
        dense = jax.eval_shape(lambda: kvjax.Segment.empty(1, 8, 65536, 128, jnp.bfloat16))
        placed = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(grid, spec))
        dense = jax.tree.map(placed, dense, sharding.specs(dense.axes(), dense))
        order = jax.jit(lambda *segments: [encode(segment.in_token_order()) for segment in segments])
        program = order.lower(*[dense] * layers).compile()
    assert "all-reduce" in program.as_text()
    # 0.07 of a layer, whose largest loop lies in VMEM; 6 with the room of all layers made at the start.
    assert program.memory_analysis().temp_size_in_bytes < planner.bytes_on_device(dense)


def test_shapes_of_a_plan_are_those_of_published_models():
    sizes = {"llama3_1_8b": 8.03, "llama3_1_70b": 70.55, "llama3_1_405b": 405.85, "qwen3_8b": 8.19}
    for name, billions in sizes.items():
        fields = json.loads((shapes.MODELS_DIR / f"{name}.json").read_text())
        d, f, n = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
        h = fields.get("head_dim", d // fields["num_attention_heads"])
        heads = fields["num_attention_heads"] + 2 * fields["num_key_value_heads"]
        layer = d * heads * h + d * fields["num_attention_heads"] * h + 3 * d * f
        tables = fields["vocab_size"] * d * (1 if fields["tie_word_embeddings"] else 2)
        assert (n * layer + tables) / 1e9 == pytest.approx(billions, rel=0.002)
