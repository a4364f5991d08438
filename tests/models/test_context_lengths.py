"""How long a context each model takes, and what a config.json means that leaves fields out."""

import json
import pathlib

import pytest

from models.families import FAMILIES, read_config
from tests.models.test_families import CHECKPOINTS

DEFAULTS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "tokenizers.json").read_text())["defaults"]
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "word_embed_proj_dim",
)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fields_left_out_are_those_of_the_class_in_transformers(architecture):
    of_class = DEFAULTS[architecture] | {"architectures": [architecture]}
    every = {key: value for key, value in of_class.items() if value is not None or key != "sliding_window"}
    if architecture == "DeepseekV2ForCausalLM":  # what this decoder reads, unlike the class's defaults
        every |= {"q_lora_rank": None, "num_experts_per_tok": 6}
    kept = [*SIZES, "q_lora_rank", "architectures"]
    sizes = {key: value for key, value in every.items() if key in kept}
    assert read_config("x", sizes) == read_config("x", every)


def test_gemma3_may_leave_out_every_size():
    # As gemma-3-4b-it publishes it.
    tower = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    tower |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = read_config("4b", {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": tower})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.max_positions, config.window, config.rope_base, config.local_rope_base) == (131072, 1024, 1e6, 1e4)
    assert config.rope_divisors == (8.0,) * 128 and [i for i in range(12) if i not in config.local_layers] == [5, 11]
    assert config.tied_embeddings and config.query_scale == 1 / 16
    # As transformers 5 saves the same.
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    rope |= {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    saved = {key: value for key, value in tower.items() if key != "rope_scaling"} | {"rope_parameters": rope}
    saved |= {"architectures": None, "layer_types": (kinds * 6)[:34], "_sliding_window_pattern": 6}
    saved = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": saved, "tie_word_embeddings": True}
    assert read_config("4b", saved) == config


@pytest.mark.parametrize("architecture, longest", [
    ("LlamaForCausalLM", 2048),
    ("MistralForCausalLM", 131072),
    ("MixtralForCausalLM", 131072),
    ("Qwen2ForCausalLM", 32768),
    ("Qwen3ForCausalLM", 32768),
    ("Qwen3MoeForCausalLM", 32768),
    ("Gemma2ForCausalLM", 8192),
    ("Gemma3ForCausalLM", 131072),
    ("Phi3ForCausalLM", 4096),
    ("GPTNeoXForCausalLM", 2048),
    ("OPTForCausalLM", 2048),
])  # fmt: skip
def test_context_lengths_that_files_leave_out(architecture, longest):
    sizes = {key: value for key, value in DEFAULTS[architecture].items() if key in SIZES}
    assert read_config("x", sizes | {"architectures": [architecture]}).max_positions == longest


def longest(name: str, context: int | None = None, **changed) -> int:
    return read_config("x", CHECKPOINTS[name]["config"] | changed, context).max_positions


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


# What vLLM derives as max_model_len from the same fields.
@pytest.mark.parametrize(
    "name, changed, tokens",
    [
        ("qwen3", {"max_position_embeddings": 40960}, 40960),
        ("qwen3", {"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
        ("qwen2", {"max_position_embeddings": 131072, "rope_scaling": YARN}, 131072),
        ("qwen2", {"max_position_embeddings": 32768, "rope_parameters": YARN | {"rope_theta": 1e6}}, 131072),
        ("qwen2", {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        ("llama2", {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.5}}, 10240),
        ("llama3", {}, 64),
        ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 128),
        ("gemma3", {}, 64),  # linear with factor 8, but the file says the context after it
        ("gemma2", {}, 64),
        ("deepseek_v2", {}, 640),
        ("opt", {}, 64),
        ("mixtral", {"max_position_embeddings": 32768}, 32768),
    ],
)
def test_scaling_lengthens_the_context(name, changed, tokens):
    assert longest(name, **changed) == tokens


@pytest.mark.parametrize(
    "context, tokens, first", [(None, 16, 1.0), (16, 16, 1.0), (17, 64, 3.0), (64, 64, 3.0), (1000, 64, 3.0)]
)
def test_phi_takes_the_context_of_the_frequencies_that_were_loaded(context, tokens, first):
    config = read_config("x", CHECKPOINTS["phi4_mini"]["config"], context)
    assert config.max_positions == tokens and config.rope_divisors[0] == first


def test_a_window_within_the_lengthened_context_is_kept():
    changed = {"max_position_embeddings": 32768, "sliding_window": 32768}
    fields = CHECKPOINTS["mistral"]["config"] | changed
    assert read_config("x", fields).window is None
    config = read_config("x", fields | {"rope_scaling": YARN})
    assert (config.window, config.max_positions) == (32768, 131072)
    # Phi's short factors do not make a window vanish that its whole context exceeds.
    phi = CHECKPOINTS["phi3"]["config"]
    phi = phi | {"rope_scaling": phi["rope_scaling"] | {"original_max_position_embeddings": 8}}
    assert (read_config("x", phi).window, read_config("x", phi).max_positions) == (12, 8)


def test_scaling_of_neox_is_not_ignored():
    scaling = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read_config("x", CHECKPOINTS["gpt_neox"]["config"] | scaling).rope_divisors == (2.0, 2.0)


def test_local_layers_of_gemma3_are_not_scaled():
    rope = {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    rope |= {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(ValueError, match="rope_type of sliding_attention is 'linear', expected 'default'"):
        longest("gemma3", rope_parameters=rope)
