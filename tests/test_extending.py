"""What the pages about methods, kernels and families define works as they say."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.experimental.pallas import tpu as pltpu

import kvjax
from experiments.tpu_compiler import GENERATIONS, LIBTPU_ENVIRONMENT, compile_for, compile_only_device
from models import families
from models.decoder import forward, prompt_cache
from models.huggingface import load_directory
from tests.golden.tiny_weights import ROWS, VOCAB, weights
from tests.kvjax import tiny_model
from tests.kvjax.slot_arrays import H, K, T, seen_of, slots_cache
from tests.models.conftest import backend
from tests.quick_jit import quick_jit

DOCS = pathlib.Path(__file__).parents[1] / "docs"
LENGTHS = [20, 13]


def defined(page: str) -> dict:
    """What the Python examples of a page define, one after the other."""
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, page, "exec"), names)
    return names


def test_the_methods_of_the_page_keep_what_they_say():
    names = defined("write_a_method.md")
    k, v = np.random.default_rng(0).normal(size=(2, 2, K, T, H))
    init = lambda method: quick_jit(lambda cache, seen: method.init(cache, seen)[0])
    run = lambda method: init(method)(slots_cache(k, LENGTHS, v), seen_of(LENGTHS)).layers[0]
    long, even = run(names["long_values"](0.5, sinks=2)), run(names["even_positions"]())
    for row, length in enumerate(LENGTHS):
        assert _kept(even, row, 0) == [*range(0, length, 2)][: length // 2]
        for head in range(K):
            norms = np.linalg.norm(np.float32(v[row, head, :length]), axis=-1)
            norms[:2] = np.inf
            assert _kept(long, row, head) == sorted(np.argsort(-norms)[: length // 2].tolist())


@pytest.mark.parametrize("name", ["looked_at", "both", "at_every_step", "by_head"])
def test_what_else_the_page_composes_is_smaller_than_the_full_cache(name):
    names = defined("write_a_method.md")
    step, tokens = tiny_model.bind(tiny_model.params()), tiny_model.prompt(2, 64)
    read = lambda method: jax.eval_shape(
        lambda tokens: kvjax.prefill(step, method, tokens, jnp.full(2, 64), tiny_model.empty(2), room=8), tokens
    )
    method = names["looked_at"](0.25, window=8) if name == "looked_at" else names[name]
    assert kvjax.nbytes(read(method).cache) < 0.6 * kvjax.nbytes(read(kvjax.identity()).cache)


def _kept(layer, row: int, head: int) -> list[int]:
    pos = np.concatenate([np.asarray(segment.pos)[row, head] for segment in layer.segments])
    return sorted(pos[pos >= 0].tolist())


def _keys(dtype, S: int):
    k, pos = np.random.default_rng(1).normal(size=(2, 2, S, 128)), np.arange(S)
    return jnp.asarray(k, dtype), jnp.int32(np.broadcast_to(np.where(pos % 3, pos, -1), (2, 2, S)))


@pytest.mark.parametrize("S", [1, 700])
def test_the_kernel_of_the_page_computes_its_reference(S):
    key_norm = defined("write_a_kernel.md")["key_norm"]
    k, pos = _keys(jnp.bfloat16, S)
    want = np.where(pos >= 0, np.linalg.norm(np.asarray(k, np.float32), axis=-1), 0.0)
    np.testing.assert_allclose(key_norm(k, pos), want, rtol=1e-6)
    with pltpu.force_tpu_interpret_mode():
        np.testing.assert_allclose(key_norm(k, pos, implementation="mosaic_tpu"), want, rtol=1e-6)
    with pytest.raises(NotImplementedError, match="key_norm: mosaic_tpu takes at least one slot of a multiple of 128"):
        key_norm(k[..., :64], pos, implementation="mosaic_tpu")


@pytest.mark.tpu_compile
def test_the_kernel_of_the_page_goes_through_the_tpu_compiler(monkeypatch):
    for name, value in LIBTPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    op = functools.partial(defined("write_a_kernel.md")["key_norm"], implementation="mosaic_tpu")
    k, pos = jax.ShapeDtypeStruct((1, 8, 4096, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 8, 4096), jnp.int32)
    compiled = compile_for(compile_only_device(GENERATIONS[0].topology), op, k, pos)
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < k.size  # no copy of the keys


TINY_STABLELM = {
    "architectures": ["StableLmForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_qkv_bias": True,
}
_LAYER = {
    **{f"{name}_layernorm.{kind}": [64] for name in ("input", "post_attention") for kind in ("weight", "bias")},
    **{f"self_attn.{name}_proj.weight": [rows, 64] for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64))},
    **{f"self_attn.{name}_proj.bias": [rows] for name, rows in (("q", 64), ("k", 32), ("v", 32))},
    **{f"mlp.{name}_proj.weight": [48, 64] for name in ("gate", "up")},
    "mlp.down_proj.weight": [64, 48],
}
TENSORS = {
    "lm_head.weight": [VOCAB, 64],
    "model.embed_tokens.weight": [VOCAB, 64],
    "model.norm.weight": [64],
    "model.norm.bias": [64],
    **{f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in _LAYER.items()},
}
# What StableLmForCausalLM of transformers 5.2.0 and torch 2.14.1 computes from the same weights after tokens 0, 9 and
# 29 of the row: the logits of the first four ids.
LOGITS = [
    [-4.02633, -0.53234, 0.21557, 0.93550],
    [0.01593, -1.10915, -2.46267, 1.43212],
    [1.01272, -0.73413, -2.15285, 1.54580],
]


def test_the_family_of_the_page_computes_what_transformers_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    with pytest.raises(ValueError, match="StableLmForCausalLM.*supported"):
        families.read_config("tiny", TINY_STABLELM)
    defined("add_a_family.md")
    (tmp_path / "config.json").write_text(json.dumps(TINY_STABLELM))
    backend().save(str(tmp_path / "tokenizer.json"))
    safetensors.numpy.save_file(weights(TENSORS), tmp_path / "model.safetensors")
    config, params, _ = load_directory(tmp_path, jnp.float32)
    row = jnp.int32(ROWS[:1])
    logits, _ = quick_jit(forward, static_argnums=1)(
        params, config, row, jnp.arange(30)[None], prompt_cache(config, 1)
    )
    np.testing.assert_allclose(np.asarray(logits)[0, [0, 9, 29], :4], LOGITS, atol=1e-4)
    with pytest.raises(ValueError, match="use_parallel_residual is True, expected False"):
        families.read_config("tiny", TINY_STABLELM | {"use_parallel_residual": True})
