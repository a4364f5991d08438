"""Every family computes what the reference implementation computes, from a checkpoint in its published format."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import kvjax
from models.decoder import forward, prompt_cache
from models.families import read_config
from models.huggingface import load_directory
from models.weights import abstract_params
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


DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "tie_word_embeddings": False,
}
"""What matters of its config.json."""


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


def test_deepseek_v2_lite_has_its_published_size_and_caches_576_numbers_a_token():
    config = read_config("lite", DEEPSEEK_V2_LITE)
    params = jax.tree.leaves(abstract_params(config, jnp.bfloat16))
    assert round(sum(math.prod(x.shape) for x in params) / 1e9, 1) == 15.7  # billions, as its report says
    cache = jax.eval_shape(lambda: prompt_cache(config, 1, jnp.bfloat16).reserve(100))
    assert kvjax.nbytes(cache) == 27 * 100 * (2 * 576 + 4) + 4
    # 1 / sqrt(128 + 64), and what YaRN multiplies queries and keys by: 0.1 * 0.707 * log(40) + 1.
    assert config.query_scale == pytest.approx(0.0721688 * 1.2608038**2, rel=1e-6)
    assert config.rope_gain == 1.0
    for key, value in (("q_lora_rank", 1536), ("topk_method", "group_limited_greedy")):
        with pytest.raises(ValueError, match=f"{key} is {value!r}, expected"):
            read_config("large", DEEPSEEK_V2_LITE | {key: value})
