"""The parts of a decoder make up the decoder, and one declaration of its weights says all that is known of them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kvjax.observation import Needs
from models.checkpoint import save_checkpoint
from models.decoder import embed, forward, hidden_states, layer, layer_inputs, prompt_cache, run_layers, step, unembed
from models.decoder_layer import rms_norm
from models.families import read_config
from models.huggingface import load_directory
from models.int8 import Int8Matrix
from models.params import DecoderParams, LayerParams, declare
from models.weights import abstract_params, build_params, param_axes, random_params
from tests.golden.tiny_weights import weights
from tests.kvjax import tiny_model
from tests.models.test_families import CHECKPOINTS

T, LENGTHS = 12, np.array([12, 5])
POSITIONS = jnp.int32(np.where(np.arange(T) < LENGTHS[:, None], np.arange(T), -1))
CONFIG = dataclasses.replace(tiny_model.CONFIG, num_layers=3)


@functools.cache
def params() -> DecoderParams:
    return random_params(CONFIG, jax.random.key(5), jnp.float32)


@functools.cache
def composed():
    """The residual streams before and after each layer, and the caches, from the parts by hand."""
    streams, caches = [embed(params(), CONFIG, tiny_model.prompt(2, T), POSITIONS)], []
    for index, cache in enumerate(prompt_cache(CONFIG, 2).layers):
        out = layer(params(), CONFIG, index, streams[-1], POSITIONS, cache)
        streams.append(out.x)
        caches.append(out.cache)
    return streams, caches


def test_parts_composed_by_hand_are_the_decoder():
    streams, caches = composed()
    logits, cache = forward(params(), CONFIG, tiny_model.prompt(2, T), POSITIONS, prompt_cache(CONFIG, 2))
    np.testing.assert_array_equal(unembed(params(), CONFIG, streams[-1]), logits)
    jax.tree.map(np.testing.assert_array_equal, tuple(caches), cache.layers)
    last = unembed(params(), CONFIG, streams[-1], jnp.int32(LENGTHS))
    for row, length in enumerate(LENGTHS):
        # A product of one row may be summed in another order than that of many.
        np.testing.assert_allclose(last[row, 0], logits[row, length - 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exit_after", [1, 2])
def test_an_early_exit_reads_the_hidden_state_of_its_layer_and_runs_no_later_one(exit_after):
    tokens, caches = tiny_model.prompt(2, T), prompt_cache(CONFIG, 2).layers
    states = hidden_states(params(), CONFIG, tokens, POSITIONS, caches)
    broken = jax.tree.map(lambda x: x * jnp.nan, params().layers[exit_after])  # whoever runs it has NaN
    layers = (*params().layers[:exit_after], broken, *params().layers[exit_after + 1 :])
    short = params().replace(layers=layers)
    x = embed(short, CONFIG, tokens, POSITIONS)
    indices = range(exit_after)
    *_, out = run_layers(short, CONFIG, x, POSITIONS, caches[:exit_after], indices=indices)
    np.testing.assert_array_equal(out.x, states[exit_after - 1])
    # A decoder that has only these layers says the same.
    whole = dataclasses.replace(CONFIG, num_layers=exit_after)
    first = params().replace(layers=params().layers[:exit_after])
    expected, _ = forward(first, whole, tokens, POSITIONS, prompt_cache(whole, 2))
    np.testing.assert_allclose(unembed(short, CONFIG, out.x), expected, rtol=1e-5, atol=1e-5)


def test_layers_left_out_leave_the_others_with_their_own_weights_and_caches():
    _, caches = composed()
    rooms = prompt_cache(CONFIG, 2).replace(layers=tuple(caches)).reserve(1).layers
    token, at = tiny_model.prompt(2, 1, seed=1), jnp.int32(LENGTHS[:, None])
    x = embed(params(), CONFIG, token, at)
    outs = list(run_layers(params(), CONFIG, x, at, (rooms[0], rooms[2]), indices=(0, 2)))
    first = layer(params(), CONFIG, 0, x, at, rooms[0])
    np.testing.assert_array_equal(outs[1].x, layer(params(), CONFIG, 2, first.x, at, rooms[2]).x)
    assert not np.allclose(outs[1].x, layer(params(), CONFIG, 1, first.x, at, rooms[1]).x, atol=1e-3)
    with pytest.raises(ValueError, match="caches must be 3, one for each layer, got 2"):
        next(run_layers(params(), CONFIG, x, at, rooms[:2]))
    for index in (-1, 3):
        with pytest.raises(ValueError, match=f"index must be from 0 to 2, got {index}"):
            layer(params(), CONFIG, index, x, at, rooms[0])


def test_what_projections_read_is_the_normed_stream_before_each_layer():
    tokens = tiny_model.prompt(2, T)
    everywhere = jnp.broadcast_to(jnp.arange(T), (2, T))
    states = hidden_states(params(), CONFIG, tokens, everywhere, prompt_cache(CONFIG, 2).layers)
    before = [embed(params(), CONFIG, tokens, everywhere), *states[:-1]]
    read = layer_inputs(params(), CONFIG, tokens)
    assert len(read) == CONFIG.num_layers
    for found, x, of_layer in zip(read, before, params().layers):
        np.testing.assert_allclose(found, rms_norm(x, of_layer.attn_norm, CONFIG.norm_eps), rtol=1e-5, atol=1e-6)


def test_a_layer_computed_again_has_the_same_gradient():
    x, *_ = composed()[0]

    def loss(x, remat):
        out = layer(params(), CONFIG, 0, x, POSITIONS, prompt_cache(CONFIG, 2).layers[0], remat=remat)
        return jnp.sum(jnp.where((POSITIONS >= 0)[..., None], out.x, 0.0) ** 2)

    kept, again = (jax.grad(loss)(x, remat) for remat in (False, True))
    assert np.abs(kept).max() > 1
    np.testing.assert_allclose(kept, again, rtol=1e-5, atol=1e-5)
    saved = lambda remat: str(jax.make_jaxpr(jax.grad(functools.partial(loss, remat=remat)))(x))
    assert "remat" in saved(True) and "remat" not in saved(False)


def test_only_the_last_layer_is_cut_to_the_tokens_that_are_read():
    out = step(
        params(), CONFIG, tiny_model.prompt(2, T), POSITIONS, prompt_cache(CONFIG, 2), needs=Needs(queries=2),
        last_only=True,
    )  # fmt: skip
    for of_layer, whole in zip(out.cache.layers, composed()[1], strict=True):
        np.testing.assert_array_equal(of_layer.segments[0].pos, whole.segments[0].pos)
        # Of the last layer, another program.
        np.testing.assert_allclose(of_layer.segments[0].k, whole.segments[0].k, rtol=1e-5, atol=1e-5)
    whole = unembed(params(), CONFIG, composed()[0][-1], jnp.int32(LENGTHS))
    np.testing.assert_allclose(out.logits, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_every_weight_of_every_family_is_declared_with_names_shape_axes_and_dtype(name):
    """The tensors of a checkpoint are exactly those that are declared, and everything follows the declaration."""
    config, shapes = read_config(name, CHECKPOINTS[name]["config"]), CHECKPOINTS[name]["shapes"]
    declared = declare(config)
    used = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(declared):
        where = jax.tree_util.keystr(path)
        assert leaf.names and len(leaf.axes) == len(leaf.shape), where
        assert set(leaf.axes) <= {None, "vocab", "heads", "ffn"}, where
        assert (leaf.untrained is not None) == (len(leaf.shape) == 1), where  # norms and biases
        assert not leaf.multiplied or len(leaf.shape) >= 2, where
        used |= dict(zip(leaf.names, leaf.shapes))
    copy = {"lm_head.weight"} if config.tied_embeddings else set()
    assert {key: tuple(shape) for key, shape in shapes.items() if key not in copy} == used
    for int8 in (False, True):
        abstract = abstract_params(config, jnp.bfloat16, int8=int8)
        is_weight = lambda x: isinstance(x, Int8Matrix)
        trees = declared, abstract, param_axes(config, int8=int8)
        for leaf, x, axes in zip(*(jax.tree.leaves(tree, is_leaf=is_weight) for tree in trees), strict=True):
            if not (int8 and leaf.multiplied):
                assert (x.shape, x.dtype, axes) == (leaf.shape, jnp.bfloat16, P(*leaf.axes))
                continue
            outputs = (*leaf.shape[:-2], leaf.shape[-1])
            assert (x.codes.shape, x.codes.dtype, axes.codes) == (leaf.shape, jnp.int8, P(*leaf.axes))
            assert (x.scale.shape, x.scale.dtype) == (outputs, jnp.float32)
            assert axes.scale == P(*leaf.axes[:-2], leaf.axes[-1])


def test_large_matrices_are_split_and_stored_in_8_bits_and_what_is_looked_up_or_added_is_not():
    config = read_config("deepseek_v2", CHECKPOINTS["deepseek_v2"]["config"])
    found = declare(config).layers[1]
    axes = {name: leaf.axes for name, leaf in _present(found).items() if any(leaf.axes)}
    assert axes == {
        "wq": (None, "heads"),
        "w_uk": ("heads", None, None),
        "w_uv": ("heads", None, None),
        "wo": ("heads", None),
        "w_gate": (None, None, "ffn"),
        "w_up": (None, None, "ffn"),
        "w_down": (None, "ffn", None),
        "shared_w_gate": (None, "ffn"),
        "shared_w_up": (None, "ffn"),
        "shared_w_down": ("ffn", None),
    }
    whole = {name for name, leaf in _present(found).items() if not leaf.multiplied}
    assert whole == {"attn_norm", "mlp_norm", "latent_norm"}
    opt = declare(read_config("opt", CHECKPOINTS["opt"]["config"]))
    assert not opt.embed.multiplied and opt.embed.axes == ("vocab", None) and opt.positions.axes == (None, None)
    assert opt.layers[0].wqkv_bias.axes == ("heads",) and opt.layers[0].wo_bias.axes == (None,)
    assert opt.layers[0].w_up_bias.axes == ("ffn",) and opt.layers[0].w_down_bias.axes == (None,)


def _present(of_layer: LayerParams) -> dict:
    named = {field.name: getattr(of_layer, field.name) for field in dataclasses.fields(of_layer)}
    return {name: leaf for name, leaf in named.items() if leaf is not None}


@pytest.mark.parametrize("name, int8", [("opt", False), ("deepseek_v2", True)])
def test_params_are_dicts_by_name_and_back(name, int8):
    config = read_config(name, CHECKPOINTS[name]["config"])
    built = build_params(config, weights(CHECKPOINTS[name]["shapes"]).__getitem__, jnp.float32, int8=int8)
    named = built.to_dict()
    assert "head" not in named or built.head is not None
    assert not any(leaf is None for leaf in jax.tree.leaves(named, is_leaf=lambda leaf: leaf is None))
    again = DecoderParams.from_dict(named)
    assert jax.tree.structure(again) == jax.tree.structure(built)
    jax.tree.map(np.testing.assert_array_equal, again, built)
    with pytest.raises(TypeError, match="w_sideways"):
        layers = ({**named["layers"][0], "w_sideways": 0}, *named["layers"][1:])
        DecoderParams.from_dict(named | {"layers": layers})


def test_a_checkpoint_names_its_arrays_as_the_fields(tiny, tmp_path):
    """So that what was written when params were dicts can be read."""
    saved = load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32, int8=True)
    save_checkpoint(tmp_path / "saved", *saved)
    about = json.loads((tmp_path / "saved" / "arrays" / "_METADATA").read_text())
    names = {tuple(key["key"] for key in entry["key_metadata"]) for entry in about["tree_metadata"].values()}
    layer = {("attn_norm",), ("mlp_norm",)}
    layer |= {(name, part) for name in ("wqkv", "wo", "w_gate", "w_up", "w_down") for part in ("codes", "scale")}
    of_layers = {("layers", str(i), *name) for i in range(2) for name in layer}
    assert names == {("embed",), ("final_norm",), ("head",)} | of_layers
    assert isinstance(saved[1].layers[0].wqkv, Int8Matrix)
