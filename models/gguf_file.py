"""Decoders from GGUF files, the format of llama.cpp."""

from __future__ import annotations

import pathlib
from typing import Any

import gguf
import numpy as np

from models import tokenizer as tokenizer_lib
from models import weights
from models.config import DecoderConfig

ARCHITECTURES = ("llama",)

# GGUF name -> Hugging Face name, without ".weight".
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Keys that `_read_config` turns into the config, without the "llama." before them.
_USED = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}
# Keys that change nothing at this value; at any other they ask for something this decoder does not do.
_NEUTRAL = {"rope.scaling.type": "none", "attention.causal": True, "expert_count": 0, "expert_used_count": 0}


def load_gguf(path: str | pathlib.Path, dtype) -> tuple[DecoderConfig, dict[str, Any], tokenizer_lib.Tokenizer]:
    """Loads a decoder, its weights dequantized, and its tokenizer.

    Args:
      path: the .gguf file.
      dtype: of the params.

    Returns:
      The config (named after the file), the params of `models.weights`, and the tokenizer.

    Raises:
      ValueError: not a GGUF file, truncated, or a model that this decoder would not compute faithfully; the message
        opens with the path.
    """
    path = pathlib.Path(path)
    try:
        reader = _open(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        config = _read_config(path.stem, metadata, tied="lm_head.weight" not in tensors)
        weights.check_names(config, tensors)
        tokenizer = tokenizer_lib.from_gguf(metadata)
        params = weights.build_params(config, lambda name: _read_tensor(tensors[name], name, config), dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, params, tokenizer


def _open(path: pathlib.Path) -> gguf.GGUFReader:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("This is not a GGUF file.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        # The reader slices past the end without a check: a short file shows as whatever breaks first.
        raise ValueError(f"The file is truncated or damaged ({error}).") from error


def _read_config(name: str, metadata: dict[str, Any], tied: bool) -> DecoderConfig:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {architecture!r}, supported: {', '.join(ARCHITECTURES)}.")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"split.count is {metadata['split.count']}, expected a model in one file.")
    prefix = f"{architecture}."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}

    for key, value in fields.items():
        if key not in _USED and (key not in _NEUTRAL or value != _NEUTRAL[key]):
            raise ValueError(f"{prefix}{key} is {value!r}, which this decoder does not support.")

    def size(key: str, default: int | None = None) -> int:
        value = fields.get(key, default)
        if not isinstance(value, int):  # some families give one value per layer
            raise ValueError(f"{prefix}{key} is {value!r}, expected one integer.")
        return value

    heads = size("attention.head_count")
    head_dim = size("attention.key_length", size("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise ValueError(f"{prefix}{key} is {fields[key]}, expected the head dimension, {head_dim}.")
    if "attention.layer_norm_rms_epsilon" not in fields:
        raise ValueError(f"{prefix}attention.layer_norm_rms_epsilon is missing, expected a float.")
    return DecoderConfig(
        name=name,
        vocab_size=size("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        num_layers=size("block_count"),
        width=size("embedding_length"),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_width=size("feed_forward_length"),
        rope_base=float(fields.get("rope.freq_base", 10000.0)),
        norm_eps=float(fields["attention.layer_norm_rms_epsilon"]),
        max_positions=size("context_length"),
        tied_embeddings=tied,
    )


def _hf_name(name: str) -> str:
    """Returns the Hugging Face name of a GGUF tensor, or the name as it is when it has none."""
    if name == "rope_freqs.weight":
        raise ValueError("Tensor rope_freqs.weight asks for rope scaling, which this decoder does not support.")
    stem, suffix = name.rpartition(".")[::2]
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if stem.startswith("blk.") and part in _BLOCK:
        return f"model.layers.{block}.{_BLOCK[part]}.{suffix}"
    return name


def _read_tensor(tensor: gguf.ReaderTensor, name: str, config: DecoderConfig) -> np.ndarray:
    """Dequantizes one tensor to float32, queries and keys in the row order of Hugging Face."""
    try:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"Tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be dequantized.") from error
    if name.endswith("q_proj.weight"):
        return _halves(array, config.num_heads)
    if name.endswith("k_proj.weight"):
        return _halves(array, config.num_kv_heads)
    return array


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from rotary pairs (0, 1), (2, 3), ... to pairs (0, H/2), (1, H/2 + 1), ...

    llama.cpp rotates neighbouring channels of this architecture and its converter permutes W_q and W_k to match; here
    the first half of a head rotates with the second.
    """
    if rows.ndim != 2 or rows.shape[0] % (2 * heads):
        return rows  # a wrong shape: build_params reports it with the name
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
