"""GGUF files of every supported architecture give the config and params of the same model in a directory."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.gguf_file import ARCHITECTURES, load_gguf
from models.huggingface import load_directory
from tests.golden.tiny_weights import weights
from tests.models.conftest import interleave
from tests.models.test_families import CHECKPOINTS, write

# What llama.cpp's converter calls tensors, and the keys it writes beside those that all architectures have.
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
EXPERTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
NEOX = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
NEOX_TOP = {"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output"}
TOP = NEOX_TOP | {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# What the converter writes as tokenizer.ggml.pre for each family, all of them byte-level vocabularies; the other
# vocabularies are SentencePiece's, with the name "default".
PRE_TOKENIZERS = {
    "llama2": ["llama-bpe", "smollm", "falcon3", "deepseek-llm", "deepseek-coder", "mellum", "seed-coder"],
    "mistral": ["tekken", "minerva-7b"],
    "mixtral": ["tekken"],
    "qwen2": ["qwen2", "deepseek-r1-qwen"],
    "qwen2_yarn": ["qwen2"],
    "qwen3": ["qwen2"],
    "qwen3_moe": ["qwen2"],
    "gemma2": [],
    "gemma3": [],
    "phi4_mini": ["gpt-4o", "dbrx"],
    "deepseek_v2": ["deepseek-llm"],
    "gpt_neox": ["olmo"],
}
SENTENCEPIECE = ("llama2", "mistral", "mixtral", "gemma2", "gemma3", "phi4_mini")
FILES = {
    "llama2": ("llama", {}),
    "mistral": ("llama", {"attention.sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2_yarn": (
        "qwen2",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        },
    ),
    "qwen3": ("qwen3", {"attention.key_length": 16}),
    "qwen3_moe": (
        "qwen3moe",
        {
            "attention.key_length": 16,
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
        },
    ),
    "mixtral": ("llama", {"expert_count": 4, "expert_used_count": 2}),
    "gemma2": (
        "gemma2",
        {
            "attention.key_length": 16,
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "attention.key_length": 16,
            "attention.sliding_window": 6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi4_mini": (
        "phi3",
        {
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 16,
            "attention.head_count": 2,
            "attention.head_count_kv": 1,
        },
    ),
    "deepseek_v2": (
        "deepseek2",
        {
            "feed_forward_length": 40,
            "attention.head_count_kv": 1,
            "attention.kv_lora_rank": 40,
            "attention.key_length": 48,
            "attention.value_length": 40,
            "attention.key_length_mla": 16,
            "attention.value_length_mla": 12,
            "rope.dimension_count": 8,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 0.0707,
            "leading_dense_block_count": 1,
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_shared_count": 2,
            "expert_feed_forward_length": 24,
            "expert_weights_scale": 1.5,
            "expert_gating_func": 1,
        },
    ),
    "gpt_neox": (
        "gptneox",
        {
            "embedding_length": 64,
            "rope.dimension_count": 4,
            "use_parallel_residual": True,
            "attention.layer_norm_epsilon": 1e-5,
        },
    ),
}


def write_gguf(name: str, path, whole_up_projection: bool = False, pre: str | None = None, **changed) -> None:
    """Writes the file of a family; `changed` are fields, with __ for dots, of which None is left out."""
    architecture, more = FILES[name]
    pre = pre or (PRE_TOKENIZERS[name] or ["default"])[0]
    if whole_up_projection:  # as in files before 2025
        of_heads = {"attention.head_count_kv": 4, "attention.key_length": 16, "attention.value_length": 12}
        more = {key: value for key, value in more.items() if not key.endswith("_mla")} | of_heads
    config, shapes = CHECKPOINTS[name]["config"], CHECKPOINTS[name]["shapes"]
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads", 4),
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": float(config.get("rope_theta", 10000.0)),
        "vocab_size": 64,
    } | more
    fields |= {key.replace("__", "."): value for key, value in changed.items()}
    fields = {key: value for key, value in fields.items() if value is not None}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "llama" if pre == "default" else "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    if pre == "default":
        writer.add_array("tokenizer.ggml.tokens", ["<unk>", "▁", *map(chr, range(97, 158)), "ab"])
        writer.add_array("tokenizer.ggml.scores", [float(-i) for i in range(64)])
        writer.add_array("tokenizer.ggml.token_type", [2] + [1] * 63)
    else:
        writer.add_array("tokenizer.ggml.tokens", [*map(chr, range(97, 160)), "ab"])
        writer.add_array("tokenizer.ggml.merges", ["a b"])
        writer.add_array("tokenizer.ggml.token_type", [1] * 64)
    tensors, experts = weights(shapes), {}
    for key, tensor in tensors.items():
        stem, _, suffix = key.rpartition(".")
        if ".experts." in stem:
            at, expert, part = stem.rsplit(".", 2)
            block = at.removeprefix("model.layers.").partition(".")[0]
            experts.setdefault(f"blk.{block}.ffn_{EXPERTS[part]}_exps.weight", {})[int(expert)] = tensor
            continue
        if stem in TOP:
            named = TOP[stem]
        else:
            block, _, part = stem.removeprefix("gpt_neox.layers.").removeprefix("model.layers.").partition(".")
            gemma = architecture.startswith("gemma")
            parts = PARTS | NEOX | ({"post_attention_layernorm": "post_attention_norm"} if gemma else {})
            if part == "attention.query_key_value":
                heads = tensor.reshape(4, 3, 16, *tensor.shape[1:])
                tensor = np.concatenate([heads[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])
            named = f"blk.{block}.{parts[part]}"
            if architecture == "llama" and part.endswith(("q_proj", "k_proj")):
                heads = config["num_attention_heads" if part.endswith("q_proj") else "num_key_value_heads"]
                tensor = interleave(tensor, heads)
        if stem.endswith("self_attn.kv_b_proj") and not whole_up_projection:
            of_keys, of_values = np.split(tensor.reshape(4, 20, 40), (8,), axis=1)
            writer.add_tensor(f"blk.{block}.attn_k_b.{suffix}", np.ascontiguousarray(of_keys.swapaxes(1, 2)))
            writer.add_tensor(f"blk.{block}.attn_v_b.{suffix}", np.ascontiguousarray(of_values))
            continue
        if architecture.startswith("gemma") and stem.endswith("norm"):
            tensor = tensor + np.float32(1)
        writer.add_tensor(f"{named}.{suffix}", tensor)
    for named, parts in experts.items():
        writer.add_tensor(named, np.stack([parts[i] for i in sorted(parts)]))
    if "short_factor" in (scaling := config.get("rope_scaling") or {}):
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.float32(scaling[f"{kind}_factor"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name, old", [*((name, False) for name in FILES), ("deepseek_v2", True)])
def test_config_and_params_are_those_of_the_directory(name, old, tmp_path, monkeypatch):
    write_gguf(name, tmp_path / "model.gguf", whole_up_projection=old)
    folder = tmp_path / "folder"
    if name.startswith("gemma"):
        # llama.cpp derives these: the scale from the head dimension, the layers from the family's own pattern.
        fields = CHECKPOINTS[name]["config"] | {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6}
        monkeypatch.setitem(CHECKPOINTS, name, CHECKPOINTS[name] | {"config": fields})
    if name == "deepseek_v2":
        # llama.cpp has one number for mscale and mscale_all_dim, which published models have alike.
        scaling = CHECKPOINTS[name]["config"]["rope_scaling"] | {"mscale": 0.707}
        fields = CHECKPOINTS[name]["config"] | {"rope_scaling": scaling}
        monkeypatch.setitem(CHECKPOINTS, name, CHECKPOINTS[name] | {"config": fields})
    config, params, _ = load_directory(write(name, folder), jnp.float32)
    found, read, _ = load_gguf(tmp_path / "model.gguf", jnp.float32)
    expected = dataclasses.asdict(dataclasses.replace(config, name="model"))
    for key, value in dataclasses.asdict(found).items():
        metadata = isinstance(value, float) or key == "rope_divisors"  # float32
        assert value == (pytest.approx(expected[key], rel=1e-6) if metadata else expected[key]), key
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), read, params)


@pytest.mark.parametrize(
    "name, pre",
    [*((name, pre) for name in FILES for pre in PRE_TOKENIZERS[name]), *((name, "default") for name in SENTENCEPIECE)],
)
def test_vocabularies_of_every_family_are_read(name, pre, tmp_path):
    write_gguf(name, tmp_path / "model.gguf", pre=pre)
    read = load_gguf(tmp_path / "model.gguf", jnp.float32)[2]
    assert read.encode("ab")[-1] == 63 and read.decode(read.encode("ab")) == "ab"


def test_every_architecture_is_tested():
    assert {architecture for architecture, _ in FILES.values()} == set(ARCHITECTURES)
