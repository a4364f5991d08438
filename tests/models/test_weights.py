"""Params hold the tensors of the file, in the declared layout, or the error says which tensor is wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import weights
from models.params import split_qkv


def test_every_leaf_is_the_named_tensors_transposed_side_by_side(tiny):
    params = weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.float32)
    t = tiny.tensors
    assert set(params.to_dict()) == {"embed", "final_norm", "head", "layers"}
    np.testing.assert_array_equal(params.embed, t["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params.final_norm, t["model.norm.weight"])
    np.testing.assert_array_equal(params.head, t["lm_head.weight"])
    assert isinstance(params.layers, tuple) and len(params.layers) == 2
    for i, layer in enumerate(params.layers):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        assert set(params.to_dict()["layers"][i]) == {"attn_norm", "wqkv", "wo", "mlp_norm", "w_gate", "w_up", "w_down"}
        np.testing.assert_array_equal(layer.attn_norm, t[f"model.layers.{i}.input_layernorm.weight"])
        np.testing.assert_array_equal(layer.mlp_norm, t[f"model.layers.{i}.post_attention_layernorm.weight"])
        # Two KV heads of 6 channels, each with 12 columns of queries, then 6 of its key and 6 of its value.
        for name, part in zip("qkv", split_qkv(tiny.config, layer.wqkv)):
            np.testing.assert_array_equal(part.reshape(12, -1), t[f"{attn}.{name}_proj.weight"].T)
        np.testing.assert_array_equal(layer.wqkv[:, 24:36], t[f"{attn}.q_proj.weight"].T[:, 12:])
        np.testing.assert_array_equal(layer.wqkv[:, 12:18], t[f"{attn}.k_proj.weight"].T[:, :6])
        np.testing.assert_array_equal(layer.wo, t[f"{attn}.o_proj.weight"].T)
        np.testing.assert_array_equal(layer.w_gate, t[f"{mlp}.gate_proj.weight"].T)
        np.testing.assert_array_equal(layer.w_up, t[f"{mlp}.up_proj.weight"].T)
        np.testing.assert_array_equal(layer.w_down, t[f"{mlp}.down_proj.weight"].T)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_built_random_and_abstract_params_have_one_structure(tiny, tied, dtype):
    config = dataclasses.replace(tiny.config, tied_embeddings=tied)
    abstract = weights.abstract_params(config, dtype)
    assert (abstract.head is None) is tied
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype(dtype)}
    built = weights.build_params(config, tiny.tensors.__getitem__, dtype)
    drawn = jax.eval_shape(lambda key: weights.random_params(config, key, dtype), jax.random.key(0))

    def structure(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert structure(built) == structure(abstract) == structure(drawn)


def test_bfloat16_params_are_the_float32_ones_rounded(tiny):
    exact = weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.float32)
    rounded = weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.bfloat16)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y), exact, rounded)


def test_params_do_not_alias_the_tensors_they_came_from(tiny):
    params = weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.float32)
    before = np.array(params.embed)
    tiny.tensors["model.embed_tokens.weight"][:] = 0.0
    np.testing.assert_array_equal(params.embed, before)


def test_random_params_have_unit_norms_and_variance_one_over_fan_in(tiny):
    config = dataclasses.replace(tiny.config, width=256, ffn_width=1024)
    params = weights.random_params(config, jax.random.key(1), jnp.float32)
    layer = params.layers[1]
    np.testing.assert_array_equal(layer.attn_norm, np.ones(256))
    np.testing.assert_array_equal(params.final_norm, np.ones(256))
    for leaf, fan_in in (
        (params.embed, 256),
        (layer.wqkv, 256),
        (layer.wo, 24),
        (layer.w_down, 1024),
    ):
        # The smallest leaf has 6,144 entries, so its sample deviation has a standard error of 0.9 %.
        np.testing.assert_allclose(np.std(leaf), fan_in**-0.5, rtol=0.04)
    assert not np.array_equal(params.layers[0].wo, params.layers[1].wo)


def test_missing_tensor_is_named_with_its_shape(tiny):
    del tiny.tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is missing.*\[12, 12\]"):
        weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.float32)


def test_wrong_shape_is_named_with_both_shapes(tiny):
    tiny.tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((12, 32), np.float32)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight .*\[12, 32\], expected \[32, 12\]"):
        weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.float32)


@pytest.mark.parametrize("dtype", [np.int8, jnp.float8_e4m3fn])
def test_quantized_tensors_are_not_taken_for_weights(tiny, dtype):
    tiny.tensors["model.norm.weight"] = np.ones(12, dtype)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is (int8|float8_e4m3fn), expected floating point"):
        weights.build_params(tiny.config, tiny.tensors.__getitem__, jnp.float32)


def test_tensors_nobody_would_use_are_refused_except_derived_ones(tiny):
    names = list(tiny.tensors)
    weights.check_names(tiny.config, names)
    weights.check_names(tiny.config, [*names, "model.layers.0.self_attn.rotary_emb.inv_freq"])
    weights.check_names(dataclasses.replace(tiny.config, tied_embeddings=True), names)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias"):
        weights.check_names(tiny.config, [*names, "model.layers.0.self_attn.q_proj.bias"])
    with pytest.raises(ValueError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        weights.check_names(tiny.config, [*names, "model.layers.2.input_layernorm.weight"])
