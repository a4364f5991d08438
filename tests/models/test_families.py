"""Every family computes what the reference implementation computes, from a checkpoint in its published format."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models.decoder import forward, prompt_cache
from models.huggingface import load_directory
from tests.golden.tiny_weights import ROWS, weights
from tests.models.conftest import backend
from tests.quick_jit import quick_jit

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CHECKPOINTS = json.loads((GOLDEN / "families.json").read_text())
LENGTHS = np.array([len(row) - 10 for row in ROWS])  # of the prompts; ten tokens are decoded
CHUNK = 8


@functools.cache
def golden():
    return dict(np.load(GOLDEN / "family_logits.npz"))


def write(name: str, path: pathlib.Path) -> pathlib.Path:
    """The checkpoint as a Hugging Face directory."""
    checkpoint = CHECKPOINTS[name]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(checkpoint["config"]))
    backend().save(str(path / "tokenizer.json"))
    safetensors.numpy.save_file(weights(checkpoint["shapes"]), path / "model.safetensors")
    return path


def tokens_at(starts: np.ndarray, count: int, ends: np.ndarray):
    """i32[2, count] tokens from `starts` on, and their positions, -1 from `ends` on."""
    positions = starts[:, None] + np.arange(count)
    tokens = [[row[min(p, len(row) - 1)] for p in at] for row, at in zip(ROWS, positions)]
    return jnp.int32(tokens), jnp.int32(np.where(positions < ends[:, None], positions, -1))


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_logits_are_those_of_transformers(name, tmp_path):
    # transformers takes the frequencies of long contexts where a text is longer than the 16 tokens of this config.
    context = 64 if name == "phi4_mini" else None
    config, params, _ = load_directory(write(name, tmp_path / name), jnp.float32, context=context)
    run = functools.partial(quick_jit(forward, static_argnums=1), params, config)
    expected = [golden()[f"{name}/{row}"] for row in range(2)]

    def compare(logits, positions):
        for row, of_row in enumerate(np.asarray(positions)):
            real = of_row >= 0
            assert np.abs(np.asarray(logits)[row][real] - expected[row][of_row[real]]).max(initial=0.0) < 1e-4

    one_shot = tokens_at(np.array([0, 0]), LENGTHS.max(), LENGTHS)
    compare(run(*one_shot, prompt_cache(config, 2))[0], one_shot[1])

    cache = prompt_cache(config, 2).reserve(40)
    for start in range(0, LENGTHS.max(), CHUNK):
        chunk = tokens_at(np.array([start, start]), CHUNK, LENGTHS)
        logits, cache = run(*chunk, cache)
        compare(logits, chunk[1])
    for step in range(10):
        token = tokens_at(LENGTHS + step, 1, LENGTHS + 10)
        logits, cache = run(*token, cache)
        compare(logits, token[1])
