"""A damaged file is one sentence that names the file and the field, never a bare traceback."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import tokenizer
from models.gguf_file import load_gguf
from models.huggingface import load_directory

BOM = "\ufeff"


def refused(load, path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(path, jnp.float32)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content, kind", [([1], "an array"), ("x", "a string"), (None, "null"), (3, "a number")])
def test_json_that_is_no_object_is_named(tiny, tmp_path, file, content, kind):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / file).write_text(json.dumps(content))
    refused(load_directory, path, f"tiny: {file} is {kind}, expected an object")


def test_a_byte_order_mark_is_no_part_of_a_file(tiny, tmp_path):
    path = tiny.write_directory(tmp_path / "tiny", shards=2)
    expected = load_directory(path, jnp.float32)
    for file in path.glob("*.json"):
        file.write_text(BOM + file.read_text(encoding="utf-8"), encoding="utf-8")
    found = load_directory(path, jnp.float32)
    assert found[0] == expected[0] and found[2].eos_ids == expected[2].eos_ids
    assert found[2].chat_template == expected[2].chat_template
    assert found[2].encode("the 12") == expected[2].encode("the 12")
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"rope_parameters": {"full_attention": "yarn"}}, "full_attention of rope_parameters is 'yarn', expected an"),
        *(
            ({"rope_scaling": YARN | {"factor": factor}}, f"'yarn' needs factor, a positive number; got {factor!r}")
            for factor in (float("inf"), float("nan"), 0, -1.0, "2", True)
        ),
        ({"rope_scaling": YARN | {"attention_factor": "x"}}, "attention_factor of rope scaling 'yarn' is 'x'"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta is 1"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor unlike high_freq_factor; both are 4.0",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0, "x", 1.0]}}, "positive numbers in short_factor"),
        ({"rope_scaling": YARN | {"attention_factor": []}}, r"attention_factor of rope scaling 'yarn' is \[\]"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\], expected one of"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a positive number"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0, expected at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected at least 1"),
        ({"vocab_size": True}, "vocab_size is True, expected an integer"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is LlamaForCausalLM, supported: "),
        ({"architectures": {"a": 1}}, "architectures is .*, supported: "),
        ({"text_config": "x"}, "text_config is 'x', expected an object"),
        ({"layer_types": 5}, "layer_types is 5, expected a list"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected num_hidden_layers, 2"),
        ({"layer_types": [["x"]]}, r"layer_types has \[\['x'\]\], expected only"),
    ],
)
def test_a_field_of_config_json_that_cannot_be_is_named(tiny, tmp_path, fields, message):
    tiny.hf_config.update(fields)
    path = tiny.write_directory(tmp_path / "tiny")
    refused(load_directory, path, f"tiny: .*{message}.*, in config.json")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [-1, 9999, [2, 9999], [[2]], "2", 2.0, True])
def test_ends_that_are_no_tokens_are_refused(tiny, tmp_path, file, ids):
    path = tiny.write_directory(tmp_path / "tiny")
    fields = tiny.hf_config if file == "config.json" else {}
    (path / file).write_text(json.dumps({**fields, "eos_token_id": ids}))
    message = f"eos_token_id of {file} is .*, expected token ids from 0 to {tiny.config.vocab_size - 1}"
    refused(load_directory, path, message)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"chat_template": 5}, "chat_template of tokenizer_config.json is a number"),
        ({"chat_template": ["x"]}, r"chat_template\[0\] of tokenizer_config.json has no name or no template"),
        ({"chat_template": [{"name": "default"}]}, r"chat_template\[0\] of tokenizer_config.json has no name or"),
        ({"chat_template": [{"name": [], "template": ""}]}, r"chat_template\[0\] of tokenizer_config.json has no name"),
        ({"eos_token": 2}, "eos_token of tokenizer_config.json is 2, expected a string"),
        ({"bos_token": {"content": 1}}, "bos_token of tokenizer_config.json is 1, expected a string"),
    ],
)
def test_a_field_of_tokenizer_config_json_that_cannot_be_is_named(tiny, tmp_path, settings, message):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(load_directory, path, message)


def test_a_chat_template_that_is_no_text_is_named(tiny, tmp_path):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refused(load_directory, path, "chat_template.jinja is not UTF-8")


ENDS = "expected one token id from 0 to"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tokenizer.ggml.eos_token_id": [1, 2]}, f"tokenizer.ggml.eos_token_id is a list of 2, {ENDS}"),
        ({"tokenizer.ggml.eos_token_id": 9999}, f"tokenizer.ggml.eos_token_id is 9999, {ENDS}"),
        ({"tokenizer.ggml.bos_token_id": "x"}, f"tokenizer.ggml.bos_token_id is 'x', {ENDS}"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges has 1 at 0, expected a list of strings"),
        ({"tokenizer.ggml.merges": ["the"]}, "tokenizer.ggml.merges has 'the', expected two pieces"),
        ({"tokenizer.ggml.merges": 5}, "tokenizer.ggml.merges is 5, expected a list of strings"),
        ({"tokenizer.ggml.tokens": [1]}, "tokenizer.ggml.tokens has 1 at 0, expected a list of strings"),
        ({"tokenizer.ggml.token_type": ["a"]}, "tokenizer.ggml.token_type has 'a' at 0, expected a list of integers"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
        ({"tokenizer.ggml.pre": ["a"]}, r"tokenizer.ggml.pre is \['a'\], supported"),
        ({"tokenizer.ggml.model": ["a"]}, r"tokenizer.ggml.model is \['a'\], supported"),
        ({"split.count": "x"}, "split.count is 'x', expected a model in one file"),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template is 5, expected a string"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0, expected an integer of at least 1"),
        ({"llama.attention.key_length": 0}, "llama.attention.key_length is 0, expected an integer of at least 1"),
        ({"llama.rope.dimension_count": "x"}, "llama.rope.dimension_count is 'x', expected an integer"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": float("inf")},
            "llama.rope.scaling.factor is inf, expected a positive number",
        ),
    ],
)
def test_metadata_of_gguf_that_cannot_be_is_named(tiny, tmp_path, fields, message):
    tiny.gguf_fields.update(fields)
    refused(load_gguf, tiny.write_gguf(tmp_path / "tiny.gguf"), message)


def test_two_files_of_weights_without_an_index_are_both_named(tiny, tmp_path):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / "model.safetensors").rename(path / "a.safetensors")
    safetensors.numpy.save_file({"x": np.ones(2, np.float32)}, path / "b.safetensors")
    refused(load_directory, path, "found of .*: a.safetensors, b.safetensors")


@pytest.mark.parametrize(
    "shard, message",
    [
        ("gone.safetensors", "gone.safetensors, named by model.safetensors.index.json, is missing"),
        (5, "weight_map of model.safetensors.index.json gives model.norm.weight no file name"),
    ],
)
def test_an_index_without_its_files_is_named(tiny, tmp_path, shard, message):
    path = tiny.write_directory(tmp_path / "tiny", shards=2)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(content))
    refused(load_directory, path, message)


def test_an_index_that_names_one_of_two_shards_leaves_tensors_missing(tiny, tmp_path):
    path = tiny.write_directory(tmp_path / "tiny", shards=2)
    index = path / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(named, "model-00001-of-00002.safetensors")}))
    refused(load_directory, path, "Tensor model.* is missing, expected one of shape")


@pytest.mark.parametrize("ids", [[-1], [2, -1], [1 << 32], np.int32([3, -1])])
def test_ids_without_a_token_are_named(tiny, ids):
    wrong = next(i for i in ids if not 0 <= i < 1 << 32)
    message = f"^ids has {wrong} at .*expected token ids from 0 to {tiny.config.vocab_size - 1}"
    with pytest.raises(ValueError, match=message):
        tokenizer.from_gguf(tiny.gguf_fields).decode(ids)


@pytest.mark.parametrize("text, at", [("\ud800", 0), ("the \udc00", 4)])
def test_half_a_surrogate_pair_is_no_text(tiny, text, at):
    with pytest.raises(ValueError, match=f"^text has .* at {at}, half of a surrogate pair"):
        tokenizer.from_gguf(tiny.gguf_fields).encode(text)
