"""What loading holds in memory, and where it puts what it reads."""

import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models.families import read_config
from models.huggingface import load_directory
from models.params import declare
from tests.models.conftest import backend
from tests.models.test_families import CHECKPOINTS

ROOT = pathlib.Path(__file__).parents[2]
WIDE = CHECKPOINTS["llama2"]["config"] | {
    "vocab_size": 24576,
    "hidden_size": 512,
    "intermediate_size": 8192,
    "num_hidden_layers": 1,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def sharded_checkpoint(tmp_path_factory):
    """A model of 108 MB as float32, in three files of bfloat16."""
    path = tmp_path_factory.mktemp("wide")
    (path / "config.json").write_text(json.dumps(WIDE))
    backend().save(str(path / "tokenizer.json"))
    leaves = jax.tree.leaves(declare(read_config("wide", WIDE)))
    shapes = {name: shape for leaf in leaves for name, shape in zip(leaf.names, leaf.shapes)}
    files = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(shapes)}
    for file in set(files.values()):
        tensors = {name: np.ones(shapes[name], jnp.bfloat16) for name in shapes if files[name] == file}
        safetensors.numpy.save_file(tensors, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


@pytest.mark.parametrize("dtype, int8", [(jnp.float32, False), (jnp.bfloat16, False), (jnp.float32, True)])
def test_beside_the_params_memory_for_little_more_than_the_largest_leaf_is_enough(sharded_checkpoint, dtype, int8):
    tracemalloc.start()  # of NumPy and of what files are read into; buffers of JAX are not among it
    try:
        _, params, _ = load_directory(sharded_checkpoint, dtype, int8=int8)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert largest == params.embed.nbytes >= 24 << 20
    piece = 8 << 20  # of a tensor, while its leaf is being filled
    assert 0.3 * largest < peak - after < 1.05 * largest + piece


def test_four_devices_hold_what_one_would(tmp_path):
    """Directories, 8-bit matrices, GGUF files and checkpoints go straight to their shards."""
    run = subprocess.run(
        [sys.executable, "tests/models/four_devices.py", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "as on one device\n", run.stderr
