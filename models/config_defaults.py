"""What a config.json that leaves out a field means: the defaults of the configuration classes of transformers.

Only of fields whose default `models.families` cannot write where it reads them, as families differ.
"""

from __future__ import annotations

from typing import Any

_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("LlamaForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM"), {"max_position_embeddings": 2048}
    ),
    "DeepseekV2ForCausalLM": {"max_position_embeddings": 2048, "q_lora_rank": 1536},
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": _QWEN | {"head_dim": 128},
    "Qwen3MoeForCausalLM": _QWEN | {"num_key_value_heads": 4},
    "Gemma2ForCausalLM": {
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096
    },
    "Gemma3ForCausalLM": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "Phi3ForCausalLM": {
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5
    },
    "MixtralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
}  # fmt: skip
"""By architecture. Gemma 3's files that hold a vision tower, too, name only the sizes that are unlike the default."""
