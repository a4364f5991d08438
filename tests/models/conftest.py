"""A two-layer decoder with known random weights, and the files it can be written to."""

import dataclasses
import json
import pathlib
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models.config import DecoderConfig

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
VOCAB = [*SPECIAL, *BYTES, *("".join(pair) for pair in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The decoder, its tensors by Hugging Face name, and what its files say; tests change the dicts."""

    config: DecoderConfig
    tensors: dict[str, np.ndarray]
    hf_config: dict[str, Any]
    gguf_fields: dict[str, Any]

    def write_gguf(self, path: pathlib.Path, architecture: str = "llama", q8: str = "") -> pathlib.Path:
        """Writes the file as llama.cpp's converter would; the tensor named `q8` is quantized to Q8_0."""
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in self.gguf_fields.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, tensor in self.tensors.items():
            stem = name.removesuffix(".weight").removesuffix(".bias")
            prefix, part = "", stem
            if stem.startswith("model.layers."):
                index, part = stem.removeprefix("model.layers.").split(".", 1)
                prefix = f"blk.{index}."
            if part == "self_attn.q_proj" and tensor.ndim == 2:
                tensor = interleave(tensor, self.config.num_heads)
            if part == "self_attn.k_proj" and tensor.ndim == 2:
                tensor = interleave(tensor, self.config.num_kv_heads)
            raw = None
            if name == q8:
                raw = gguf.GGMLQuantizationType.Q8_0
                tensor = gguf.quants.quantize(tensor, raw)
            writer.add_tensor(f"{prefix}{GGUF_NAMES.get(part, part)}{name.removeprefix(stem)}", tensor, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def write_directory(self, path: pathlib.Path, shards: int = 1) -> pathlib.Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.hf_config))
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": TEMPLATE})
        )
        backend().save(str(path / "tokenizer.json"))
        names = list(self.tensors)
        if shards == 1:
            safetensors.numpy.save_file(self.tensors, path / "model.safetensors")
            return path
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            weight_map.update(dict.fromkeys(names[i::shards], file))
            safetensors.numpy.save_file({name: self.tensors[name] for name in names[i::shards]}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return path


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp, written out: channel 2 i is row i of a head, channel 2 i + 1 is row i + H / 2."""
    dim = rows.shape[0] // heads
    order = [head * dim + i + half for head in range(heads) for i in range(dim // 2) for half in (0, dim // 2)]
    return np.ascontiguousarray(rows[order])


def backend() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCAB)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture
def tiny() -> Tiny:
    """D 12, N 4, K 2, H 6 (so N H is not D), F 32, two layers, untied."""
    config = DecoderConfig(
        name="tiny",
        vocab_size=len(VOCAB),
        num_layers=2,
        width=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        ffn_width=32,
        rope_base=5000.0,
        norm_eps=0.03125,
        max_positions=64,
        tied_embeddings=False,
    )
    shapes = {"model.embed_tokens": (len(VOCAB), 12), "model.norm": (12,), "lm_head": (len(VOCAB), 12)}
    for i in range(2):
        shapes |= {
            f"model.layers.{i}.input_layernorm": (12,),
            f"model.layers.{i}.self_attn.q_proj": (24, 12),
            f"model.layers.{i}.self_attn.k_proj": (12, 12),
            f"model.layers.{i}.self_attn.v_proj": (12, 12),
            f"model.layers.{i}.self_attn.o_proj": (12, 24),
            f"model.layers.{i}.post_attention_layernorm": (12,),
            f"model.layers.{i}.mlp.gate_proj": (32, 12),
            f"model.layers.{i}.mlp.up_proj": (32, 12),
            f"model.layers.{i}.mlp.down_proj": (12, 32),
        }
    rng = np.random.default_rng(0)
    return Tiny(
        config=config,
        tensors={f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
        hf_config={
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(VOCAB),
            "num_hidden_layers": 2,
            "hidden_size": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "intermediate_size": 32,
            "rope_theta": 5000.0,
            "rms_norm_eps": 0.03125,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        gguf_fields={
            "llama.block_count": 2,
            "llama.context_length": 64,
            "llama.embedding_length": 12,
            "llama.feed_forward_length": 32,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 6,
            "llama.attention.value_length": 6,
            "llama.rope.dimension_count": 6,
            "llama.rope.freq_base": 5000.0,
            "llama.attention.layer_norm_rms_epsilon": 0.03125,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": VOCAB,
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(VOCAB) - len(SPECIAL)),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": TEMPLATE,
        },
    )
