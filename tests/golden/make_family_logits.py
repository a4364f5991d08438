"""Writes families.json and family_logits.npz: tiny checkpoints of every family, and what transformers makes of them.

It runs outside the project's environment, in one of its own:

  python -m venv golden-env
  golden-env/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
  PYTHONPATH=. golden-env/bin/python tests/golden/make_family_logits.py

It takes half a minute on two CPU cores. The weights are not stored: `tests.golden.tiny_weights` draws each tensor from
its name. families.json holds, for every checkpoint, its config.json as such models are published and the names and
shapes of its tensors as transformers saves them. The arrays of family_logits.npz, all float32:

  NAME/0, NAME/1   f32[30, V], f32[23, V]: logits after every token of `tiny_weights.ROWS`
  versions         the libraries that computed them
"""

from __future__ import annotations

import json
import pathlib
import platform
import tempfile

import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers

from tests.golden.tiny_weights import ROWS, VOCAB, weights

HERE = pathlib.Path(__file__).parent

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = COMMON | {
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
PHI = COMMON | {"pad_token_id": 0, "original_max_position_embeddings": 32, "resid_pdrop": 0.0, "attention_bias": False}


def longrope(pairs: int) -> dict:
    """Factors that differ from pair to pair."""
    short = [1.0 + 0.1 * i for i in range(pairs)]
    return {"type": "longrope", "short_factor": short, "long_factor": [3.0 * x for x in short]}


CONFIGS = {
    "llama2": ("LlamaForCausalLM", COMMON | {"num_key_value_heads": 4}),
    "llama3": (
        "LlamaForCausalLM",
        COMMON | {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", COMMON | {"sliding_window": 6}),
    "qwen2": (
        "Qwen2ForCausalLM",
        COMMON | {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 2, "rope_theta": 1e6},
    ),
    "qwen2_yarn": (
        "Qwen2ForCausalLM",
        COMMON
        | {
            "use_sliding_window": False,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", COMMON | {"head_dim": 16, "attention_bias": False, "rope_theta": 1e6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        GEMMA
        | {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("Phi3ForCausalLM", PHI | {"rope_scaling": longrope(4), "sliding_window": 12}),
    "phi4_mini": (
        "Phi3ForCausalLM",
        PHI
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.75,
            "rope_scaling": longrope(6),
            "original_max_position_embeddings": 16,
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "do_layer_norm_before": True,
            "word_embed_proj_dim": 32,
            "activation_function": "relu",
        },
    ),
    "mixtral": ("MixtralForCausalLM", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        COMMON
        | {
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        COMMON
        | {
            "intermediate_size": 40,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 40,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "mscale": 0.9,
                "mscale_all_dim": 0.707,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}


def main() -> None:
    checkpoints, arrays = {}, {}
    for name, (architecture, fields) in CONFIGS.items():
        fields = {"architectures": [architecture]} | fields
        model_class = getattr(transformers, architecture)
        config = model_class.config_class.from_dict(dict(fields), attn_implementation="eager")
        with tempfile.TemporaryDirectory() as folder:
            # Saved once for the names of its tensors, then loaded with weights that follow from these.
            model_class(config).save_pretrained(folder, max_shard_size="1GB")
            with safetensors.safe_open(pathlib.Path(folder) / "model.safetensors", framework="np") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            state = {key: torch.from_numpy(array) for key, array in weights(shapes).items()}
            safetensors.torch.save_file(state, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})
            model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for index, row in enumerate(ROWS):
            with torch.no_grad():
                arrays[f"{name}/{index}"] = model(torch.tensor([row])).logits[0].numpy()
        checkpoints[name] = {"config": fields, "shapes": shapes}
        print(name, len(shapes), "tensors, logits up to", float(np.abs(arrays[f"{name}/0"]).max()))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    arrays["versions"] = np.array([f"{name} {version}" for name, version in versions.items()])
    np.savez_compressed(HERE / "family_logits.npz", **arrays)
    (HERE / "families.json").write_text(json.dumps(checkpoints, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
