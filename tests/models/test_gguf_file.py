"""A GGUF file gives the params of the model it was converted from, or one error that says why not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import weights
from models.gguf_file import load_gguf


def test_config_params_and_tokenizer_come_back(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    config, params, tokenizer = load_gguf(path, jnp.float32)
    assert config == tiny.config
    expected = weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.float32)
    # Exact: float32 in the file, and the rotary permutation of q and k must be undone.
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert tokenizer.eos_ids == (2, 0) and tokenizer.bos_id == 1


def test_without_output_tensor_the_embeddings_are_tied(tiny, tmp_path):
    del tiny.tensors["lm_head.weight"]
    config, params, _ = load_gguf(tiny.write_gguf(tmp_path / "tiny.gguf"), jnp.bfloat16)
    assert config == dataclasses.replace(tiny.config, tied_embeddings=True)
    assert params.head is None and params.embed.dtype == jnp.bfloat16


def test_smollm2_has_its_published_shape(smollm2):
    c = smollm2.config
    assert (c.num_layers, c.width, c.num_heads, c.num_kv_heads, c.head_dim) == (30, 576, 9, 3, 64)
    assert (c.vocab_size, c.ffn_width, c.max_positions, c.rope_base) == (49152, 1536, 8192, 100000.0)
    assert c.tied_embeddings and c.norm_eps == pytest.approx(1e-5)
    # Hugging Face counts 134,515,008 parameters for this model.
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008


@pytest.mark.parametrize("keep", [0, 2, 3, 10, 200, 4000, 12000, -1])
def test_truncated_file_is_reported_as_such(tiny, tmp_path, keep):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    assert len(whole) > 12000
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"tiny\.gguf: (This is not a GGUF file|The file is truncated or damaged)"):
        load_gguf(path, jnp.float32)


def test_other_file_is_not_taken_for_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("<html>Not found</html>")
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_gguf(path, jnp.float32)


def test_unknown_architecture_lists_the_supported(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", architecture="mamba")
    with pytest.raises(ValueError, match="general.architecture is 'mamba', supported: llama"):
        load_gguf(path, jnp.float32)


@pytest.mark.parametrize(
    "key, value",
    [
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.factor", 4.0),
        ("llama.expert_shared_count", 1),
        ("llama.attention.sliding_window", [512, 0]),
        ("llama.rope.dimension_count", 4),
        ("llama.attention.value_length", 8),
        ("llama.attention.head_count_kv", [2, 1]),
        ("split.count", 3),
        ("tokenizer.ggml.model", "bert"),
        ("tokenizer.ggml.pre", "default"),
    ],
)
def test_metadata_this_decoder_does_not_follow_is_named(tiny, tmp_path, key, value):
    tiny.gguf_fields[key] = value
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        load_gguf(tiny.write_gguf(tmp_path / "tiny.gguf"), jnp.float32)


def test_neutral_metadata_is_accepted(tiny, tmp_path):
    tiny.gguf_fields["llama.rope.scaling.type"] = "none"
    tiny.gguf_fields["llama.expert_count"] = 0
    tiny.gguf_fields["llama.attention.causal"] = True
    assert load_gguf(tiny.write_gguf(tmp_path / "tiny.gguf"), jnp.float32)[0] == tiny.config


def test_a_bias_is_not_ignored(tiny, tmp_path):
    tiny.tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(24, np.float32)
    with pytest.raises(ValueError, match=r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_gguf(tiny.write_gguf(tmp_path / "tiny.gguf"), jnp.float32)


def test_rope_freqs_divide_the_frequencies(tiny, tmp_path):
    tiny.tensors["rope_freqs.weight"] = np.float32([1, 2, 8])
    config, _, _ = load_gguf(tiny.write_gguf(tmp_path / "tiny.gguf"), jnp.float32)
    assert config == dataclasses.replace(tiny.config, rope_divisors=(1.0, 2.0, 8.0))
    plain = 5000.0 ** -(np.arange(3) / 3)
    np.testing.assert_allclose(config.frequencies(0), plain / [1, 2, 8], rtol=1e-6)
    tiny.tensors["rope_freqs.weight"] = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="rope_freqs.weight has 4 numbers, expected 3"):
        load_gguf(tiny.write_gguf(tmp_path / "long.gguf"), jnp.float32)


def test_missing_and_misshapen_tensors_are_named(tiny, tmp_path):
    tensor = tiny.tensors.pop("model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        load_gguf(tiny.write_gguf(tmp_path / "missing.gguf"), jnp.float32)
    tiny.tensors["model.layers.1.self_attn.q_proj.weight"] = tensor[:16]
    with pytest.raises(ValueError, match=r"q_proj\.weight has shape \[16, 12\], expected \[24, 12\]"):
        load_gguf(tiny.write_gguf(tmp_path / "misshapen.gguf"), jnp.float32)


def test_quantized_tensors_are_dequantized(tiny, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    _, params, _ = load_gguf(tiny.write_gguf(tmp_path / "tiny.gguf", q8=name), jnp.float32)
    exact, got = tiny.tensors[name].T, np.array(params.layers[0].w_down)
    assert not np.array_equal(got, exact)
    # Q8_0 rounds a block of 32 to multiples of max|block| / 127, stored in half precision: half a step, and 2^-11.
    np.testing.assert_allclose(got, exact, rtol=2**-11, atol=0.5 * np.abs(exact).max() / 127)
