"""A two-layer random checkpoint in the published format, wide enough for groups of 32 channels."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from tests.models.conftest import TEMPLATE, VOCAB, backend

MAX_POSITIONS = 256


def write(path: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """D 64, N 4, K 2, H 32, F 96; untrained, so answers are noise and only the machinery is tested."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (len(VOCAB), 64), "model.norm": (64,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm": (64,),
            f"{layer}.self_attn.q_proj": (128, 64),
            f"{layer}.self_attn.k_proj": (64, 64),
            f"{layer}.self_attn.v_proj": (64, 64),
            f"{layer}.self_attn.o_proj": (64, 128),
            f"{layer}.post_attention_layernorm": (64,),
            f"{layer}.mlp.gate_proj": (96, 64),
            f"{layer}.mlp.up_proj": (96, 64),
            f"{layer}.mlp.down_proj": (64, 96),
        }
    tensors = {
        f"{name}.weight": (
            np.ones(shape, np.float32)
            if len(shape) == 1
            else rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        )
        for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(VOCAB),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    )
    backend().save(str(path / "tokenizer.json"))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path
