"""Files as their authors publish them today: keys, names and neighbours that a loader meets outside of its tests."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models.gguf_file import load_gguf
from models.huggingface import load_directory
from tests.golden.tiny_weights import weights
from tests.models.test_families import CHECKPOINTS, write
from tests.models.test_gguf_families import write_gguf


def config_of_gguf(path, name: str, **changed):
    write_gguf(name, path / "model.gguf", **changed)
    return load_gguf(path / "model.gguf", jnp.float32)[0]


def test_gemma3_gguf_says_its_local_rope_base(tmp_path):
    plain = config_of_gguf(tmp_path, "gemma3")
    assert plain.local_rope_base == 10000.0 and plain.local_layers == (0, 1, 2)
    assert config_of_gguf(tmp_path, "gemma3", rope__freq_base_swa=10000.0) == plain
    assert config_of_gguf(tmp_path, "gemma3", rope__freq_base_swa=500.0).local_rope_base == 500.0


@pytest.mark.parametrize("pattern, local", [(2, (0, 2)), ([False, True, True], (1, 2)), (0, (0, 1, 2)), (1, ())])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_gguf_may_say_which_layers_are_local(tmp_path, name, pattern, local):
    config = config_of_gguf(tmp_path, name, attention__sliding_window_pattern=pattern)
    assert config.local_layers == local


def test_a_pattern_of_the_wrong_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sliding_window_pattern is \[True\], expected .* 3 booleans"):
        config_of_gguf(tmp_path, "gemma3", attention__sliding_window_pattern=[True])


def test_other_families_have_no_keys_of_local_layers(tmp_path):
    with pytest.raises(ValueError, match="qwen3.rope.freq_base_swa is 10000.0"):
        config_of_gguf(tmp_path, "qwen3", rope__freq_base_swa=10000.0)


# attention_factor of transformers is the whole gain; without it the gain is 0.1 log(4) + 1.
@pytest.mark.parametrize(
    "changed, gain",
    [
        ({}, 1.138629436),
        ({"rope__scaling__yarn_attn_factor": 1.0}, 1.0),
        ({"rope__scaling__yarn_attn_factor": 0.75}, 0.75),
        ({"rope__scaling__attn_factor": 0.5}, 0.5 * 1.138629436),
        ({"rope__scaling__yarn_ext_factor": 1.0}, 1.138629436),
    ],
)
def test_yarn_gain_of_gguf_files(tmp_path, changed, gain):
    assert config_of_gguf(tmp_path, "qwen2_yarn", **changed).rope_gain == pytest.approx(gain, rel=1e-6)


def test_yarn_attn_factor_means_what_attention_factor_means(tmp_path, monkeypatch):
    fields = CHECKPOINTS["qwen2_yarn"]["config"]
    fields = fields | {"rope_scaling": fields["rope_scaling"] | {"attention_factor": 0.75}}
    monkeypatch.setitem(CHECKPOINTS, "qwen2_yarn", CHECKPOINTS["qwen2_yarn"] | {"config": fields})
    config = load_directory(write("qwen2_yarn", tmp_path / "folder"), jnp.float32)[0]
    found = config_of_gguf(tmp_path, "qwen2_yarn", rope__scaling__yarn_attn_factor=0.75)
    assert found.rope_gain == config.rope_gain == 0.75


@pytest.mark.parametrize("name, key", [("qwen2", "yarn_attn_factor"), ("qwen2", "attn_factor")])
def test_a_gain_without_yarn_is_not_ignored(tmp_path, name, key):
    with pytest.raises(ValueError, match=f"{name}.rope.scaling.{key} is 0.5, expected 1.0"):
        config_of_gguf(tmp_path, name, **{f"rope__scaling__{key}": 0.5})


def test_deepseek_refuses_two_gains(tmp_path):
    with pytest.raises(ValueError, match="yarn_attn_factor is not supported beside yarn_log_multiplier"):
        config_of_gguf(tmp_path, "deepseek_v2", rope__scaling__yarn_attn_factor=1.0)


def test_gguf_without_a_context_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="qwen2.context_length is missing, expected an integer"):
        config_of_gguf(tmp_path, "qwen2", context_length=None)


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma2", "gemma3", "phi4_mini", "mixtral"])
def test_a_sliding_window_of_0_in_a_gguf_is_none(tmp_path, name):
    config = config_of_gguf(tmp_path, name, attention__sliding_window=0)
    assert config.window is None and config.local_layers == ()


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen2", "gemma2", "gemma3", "phi3", "mixtral"])
@pytest.mark.parametrize("none", [0, None])
def test_a_sliding_window_of_0_in_config_json_is_none(tmp_path, monkeypatch, name, none):
    fields = CHECKPOINTS[name]["config"] | {"sliding_window": none, "use_sliding_window": True}
    monkeypatch.setitem(CHECKPOINTS, name, CHECKPOINTS[name] | {"config": fields})
    config = load_directory(write(name, tmp_path / "folder"), jnp.float32)[0]
    assert config.window is None and config.local_layers == ()


def test_a_negative_sliding_window_is_refused(tiny, tmp_path):
    tiny.hf_config.update(architectures=["MistralForCausalLM"], sliding_window=-1)
    with pytest.raises(ValueError, match="sliding_window is -1, expected at least 1 token, or null or 0"):
        load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32)


def same(found, expected) -> None:
    assert dataclasses.replace(found[0], name="") == dataclasses.replace(expected[0], name="")
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize(
    "neighbour", ["consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "model.sft.index"]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_the_model_is_read_beside_other_weights(tiny, tmp_path, neighbour, shards):
    expected = load_directory(tiny.write_directory(tmp_path / "tiny", shards), jnp.float32)
    safetensors.numpy.save_file({"layers.0.attention.wq.weight": np.ones(2, np.float32)}, tmp_path / "tiny" / neighbour)
    same(load_directory(tmp_path / "tiny", jnp.float32), expected)


@pytest.mark.parametrize("only", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_weights_that_are_not_the_model_are_not_taken_for_it(tiny, tmp_path, only):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / "model.safetensors").rename(path / only)
    with pytest.raises(ValueError, match=f"Expected model.safetensors or .*index.json, found of .*: {only}"):
        load_directory(path, jnp.float32)


VISION = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": np.ones((2, 3), np.float32),
    "multi_modal_projector.mm_input_projection_weight": np.ones((2, 2), np.float32),
}


def named_old(name: str) -> str:
    return name if name in VISION else f"language_model.{name}"


def named_new(name: str) -> str:
    return f"model.{name}" if name in VISION else name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("rename", [named_old, named_new])
def test_the_text_tower_of_gemma3_is_read(tmp_path, rename):
    """Its logits are those of the same weights in a file of their own, which `test_families` compares."""
    expected = load_directory(write("gemma3", tmp_path / "alone"), jnp.float32)
    fields = dict(CHECKPOINTS["gemma3"]["config"])
    del fields["architectures"]
    path = write("gemma3", tmp_path / "with_vision")
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 2]}
    fields |= {"bos_token_id": 3, "eos_token_id": 4}
    nested |= {"text_config": fields, "vision_config": {"hidden_size": 7, "model_type": "siglip_vision_model"}}
    (path / "config.json").write_text(json.dumps(nested))
    tensors = weights(CHECKPOINTS["gemma3"]["shapes"]) | VISION
    safetensors.numpy.save_file({rename(name): x for name, x in tensors.items()}, path / "model.safetensors")
    found = load_directory(path, jnp.float32)
    same(found, expected)
    assert found[2].eos_ids[:2] == (1, 2) and found[2].bos_id == 3


def test_a_tensor_of_the_text_tower_that_is_not_used_is_still_named(tmp_path):
    path = write("gemma3", tmp_path / "with_vision")
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": CHECKPOINTS["gemma3"]["config"]}
    (path / "config.json").write_text(json.dumps(nested))
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(1, np.float32)}
    tensors = weights(CHECKPOINTS["gemma3"]["shapes"]) | bias
    safetensors.numpy.save_file({named_old(name): x for name, x in tensors.items()}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_directory(path, jnp.float32)
