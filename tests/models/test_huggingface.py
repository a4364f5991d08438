"""A Hugging Face directory gives the params of its tensors, or one error that says why not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models import weights
from models.huggingface import load_directory
from models.params import split_qkv


@pytest.mark.parametrize("shards", [1, 3])
def test_config_params_and_tokenizer_come_back(tiny, tmp_path, shards):
    config, params, tokenizer = load_directory(tiny.write_directory(tmp_path / "tiny", shards), jnp.float32)
    assert config == tiny.config
    expected = weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    # generation_config.json lists 2 and 0, config.json says 2; tokenizer_config.json overrides the bos of config.json.
    assert tokenizer.eos_ids == (2, 0) and tokenizer.bos_id == 1


def test_bfloat16_files_load_exactly_in_both_dtypes(tiny, tmp_path):
    for name, tensor in tiny.tensors.items():
        tiny.tensors[name] = tensor.astype(ml_dtypes.bfloat16)
    path = tiny.write_directory(tmp_path / "tiny")
    _, narrow, _ = load_directory(path, jnp.bfloat16)
    _, wide, _ = load_directory(path, jnp.float32)
    np.testing.assert_array_equal(narrow.embed, tiny.tensors["model.embed_tokens.weight"])
    assert narrow.embed.dtype == jnp.bfloat16 and wide.embed.dtype == jnp.float32
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(jnp.float32), y), narrow, wide)


@pytest.mark.slow
def test_smollm2_as_safetensors_equals_its_gguf(smollm2, tmp_path):
    c, params = smollm2.config, smollm2.params
    tensors = {"model.embed_tokens.weight": params.embed, "model.norm.weight": params.final_norm}
    for i, layer in enumerate(params.layers):
        at = f"model.layers.{i}"
        q, k, v = (np.asarray(x).reshape(c.width, -1) for x in split_qkv(c, layer.wqkv))
        tensors |= {
            f"{at}.input_layernorm.weight": layer.attn_norm,
            f"{at}.post_attention_layernorm.weight": layer.mlp_norm,
            f"{at}.self_attn.q_proj.weight": q.T,
            f"{at}.self_attn.k_proj.weight": k.T,
            f"{at}.self_attn.v_proj.weight": v.T,
            f"{at}.self_attn.o_proj.weight": layer.wo.T,
            f"{at}.mlp.gate_proj.weight": layer.w_gate.T,
            f"{at}.mlp.up_proj.weight": layer.w_up.T,
            f"{at}.mlp.down_proj.weight": layer.w_down.T,
        }
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.width,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "intermediate_size": c.ffn_width,
        "rope_parameters": {"rope_theta": c.rope_base, "rope_type": "default"},
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "chat_template.jinja").write_text(smollm2.tokenizer.chat_template)
    smollm2.tokenizer.backend.save(str(tmp_path / "tokenizer.json"))

    config, loaded, tokenizer = load_directory(tmp_path, jnp.float32)
    assert dataclasses.replace(config, name=c.name) == c
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    text = "The key is  8314069.<|im_end|>"
    assert tokenizer.encode(text) == smollm2.tokenizer.encode(text)
    messages = [{"role": "user", "content": "Hi."}]
    assert tokenizer.chat(messages) == smollm2.tokenizer.chat(messages)
    assert tokenizer.eos_ids == smollm2.tokenizer.eos_ids


def test_defaults_are_those_of_llama(tiny, tmp_path):
    for key in ("num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings"):
        del tiny.hf_config[key]
    # Twice the width, so that the default head dimension, D / N, is 6; and as many key/value heads as query heads.
    tiny.hf_config.update(head_dim=None, hidden_size=24)
    for name, tensor in tiny.tensors.items():
        tiny.tensors[name] = np.resize(tensor, [24 if size == 12 else size for size in tensor.shape])
    config, _, _ = load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32)
    assert (config.head_dim, config.num_kv_heads) == (6, 4)
    assert (config.rope_base, config.norm_eps, config.tied_embeddings) == (10000.0, 1e-6, False)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5000.0, "rope_scaling": None},
        {"rope_theta": 5000, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
    ],
)
def test_both_spellings_of_the_rope_base(tiny, tmp_path, fields):
    tiny.hf_config.update(fields)
    assert load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32)[0].rope_base == 5000.0


@pytest.mark.parametrize(
    "key, value",
    [
        ("architectures", ["MambaForCausalLM"]),
        ("architectures", None),
        ("rope_parameters", {"rope_theta": 5000.0, "rope_type": "default", "stretched_by": 2.0}),
        ("partial_rotary_factor", 0.5),
        ("hidden_act", "xielu"),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "gptq"}),
        ("vocab_size", None),
        ("hidden_size", "12"),
    ],
)
def test_fields_this_decoder_does_not_follow_are_named(tiny, tmp_path, key, value):
    tiny.hf_config[key] = value
    with pytest.raises(ValueError, match=rf"tiny: {key} (is|has)"):
        load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32)


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic', supported: default, linear, llama3, yarn"),
        ({"type": "linear"}, "'linear' needs factor, a positive number; got None"),
        ({"rope_type": "llama3", "factor": 8.0}, "'llama3' needs low_freq_factor, a positive number; got None"),
        ({"type": "longrope", "short_factor": [1.0]}, "'longrope' needs 3 numbers in short_factor and in long_factor"),
    ],
)
def test_rope_scaling_that_is_unknown_or_incomplete_is_refused(tiny, tmp_path, scaling, message):
    tiny.hf_config["rope_scaling"] = scaling
    with pytest.raises(ValueError, match=message):
        load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32)


def test_unknown_architecture_lists_the_supported(tiny, tmp_path):
    tiny.hf_config["architectures"] = ["MambaForCausalLM"]
    with pytest.raises(ValueError, match="MambaForCausalLM.*supported: LlamaForCausalLM, MistralForCausalLM.*OPTFor"):
        load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard_is_named(tiny, tmp_path, keep):
    path = tiny.write_directory(tmp_path / "tiny", shards=2)
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is truncated or not a safetensors file"):
        load_directory(path, jnp.float32)


def test_missing_shard_is_named(tiny, tmp_path):
    path = tiny.write_directory(tmp_path / "tiny", shards=2)
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors.*is missing"):
        load_directory(path, jnp.float32)


def test_pickled_weights_are_refused_with_the_reason(tiny, tmp_path):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled.*safetensors"):
        load_directory(path, jnp.float32)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(tiny, tmp_path, file):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / file).unlink()
    with pytest.raises(ValueError, match=file.removeprefix("model.").replace(".", r"\.")):
        load_directory(path, jnp.float32)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_json_is_named(tiny, tmp_path, file):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / file).write_text('{"a": ')
    with pytest.raises(ValueError, match=f"{file} (is not valid JSON|cannot be read)"):
        load_directory(path, jnp.float32)


def test_missing_misshapen_and_unknown_tensors_are_named(tiny, tmp_path):
    q = tiny.tensors.pop("model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight is missing.*\[24, 12\]"):
        load_directory(tiny.write_directory(tmp_path / "missing"), jnp.float32)
    tiny.tensors["model.layers.1.self_attn.q_proj.weight"] = q.T.copy()
    with pytest.raises(ValueError, match=r"q_proj\.weight has shape \[12, 24\], expected \[24, 12\]"):
        load_directory(tiny.write_directory(tmp_path / "misshapen"), jnp.float32)
    tiny.tensors["model.layers.1.self_attn.q_proj.weight"] = q
    tiny.tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(24, np.float32)
    with pytest.raises(ValueError, match=r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_directory(tiny.write_directory(tmp_path / "bias"), jnp.float32)


def test_training_truncation_in_the_tokenizer_file_is_switched_off(tiny, tmp_path):
    path = tiny.write_directory(tmp_path / "tiny")
    saved = json.loads((path / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (path / "tokenizer.json").write_text(json.dumps(saved))
    _, _, tokenizer = load_directory(path, jnp.float32)
    assert tokenizer.decode(tokenizer.encode("longer than four")) == "longer than four"
