"""Decoders from GGUF files, the format of llama.cpp."""

from __future__ import annotations

import pathlib
from typing import Any

import gguf
import numpy as np

from models import gguf_deepseek2 as deepseek2
from models import tokenizer as tokenizer_lib
from models import weights
from models.config import DecoderConfig
from models.families import read_config
from models.gguf_lists import read_list
from models.leaf import Index, Tensor
from models.names import NAMES
from models.params import DecoderParams
from models.rope_scaling import positive, yarn_gain

# general.architecture -> the same in config.json. Mistral's files say llama, and so do Mixtral's, with experts.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gptneox": "GPTNeoXForCausalLM",
    "deepseek2": "DeepseekV2ForCausalLM",
}

# GGUF name -> Hugging Face name, without ".weight".
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
_NEOX_TOP = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
_NEOX = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_GEMMA = _BLOCK | {"ffn_norm": "pre_feedforward_layernorm"}
_BLOCKS = {"gemma2": _GEMMA, "gemma3": _GEMMA, "phi3": _BLOCK | {"ffn_up": "mlp.gate_up_proj"}, "gptneox": _NEOX}
_BLOCKS["deepseek2"] = _BLOCK | deepseek2.BLOCK
# Tensors of all experts in one; name of one of them.
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL = {
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts.{}.gate_proj": "block_sparse_moe.experts.{}.w1",
    "mlp.experts.{}.up_proj": "block_sparse_moe.experts.{}.w3",
    "mlp.experts.{}.down_proj": "block_sparse_moe.experts.{}.w2",
}

# Keys, without the architecture before them, and the fields of config.json that say the same.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_INTEGERS = set(_FIELDS) - {
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "use_parallel_residual",
    "rope.freq_base",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}
_REQUIRED = ("context_length", "block_count", "embedding_length", "attention.head_count")
_USED = {*_FIELDS, "attention.value_length", "rope.dimension_count"}
_SCALING = {
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# Keys about local layers.
_PATTERN = "attention.sliding_window_pattern"
_LOCAL_LAYERS = {"gemma2": {_PATTERN}, "gemma3": {_PATTERN, "rope.freq_base_swa"}}
# What llama.cpp takes where a file does not say it; config.json has other defaults in some families.
_DEFAULTS = {
    "num_key_value_heads": None,
    "sliding_window": None,
    "original_max_position_embeddings": None,
    "rope_theta": 10000.0,
}
# Keys that change nothing at this value; at any other they ask for something this decoder does not do.
_NEUTRAL = {"attention.causal": True, "rope.scaling.yarn_log_multiplier": 0.0, "rope.scaling.yarn_ext_factor": 1.0}


def load_gguf(
    path: str | pathlib.Path,
    dtype,
    *,
    context: int | None = None,
    int8: bool = False,
    shardings: weights.Shardings | None = None,
) -> tuple[DecoderConfig, DecoderParams, tokenizer_lib.Tokenizer]:
    """Loads a decoder, its weights dequantized, and its tokenizer.

    Args:
      path: the .gguf file.
      dtype: of the params.
      context: tokens the caller needs, see `models.families.read_config`.
      int8: see `models.weights.build_params`.
      shardings: see `models.weights.build_params`.

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
        architecture = _architecture(metadata)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        config = read_config(path.stem, _config_fields(architecture, metadata, stored), context)
        tensors = _hf_tensors(architecture, config, stored)
        weights.check_names(config, tensors)
        tokenizer = tokenizer_lib.from_gguf(metadata)
        halves = architecture == "llama"

        def get(name: str) -> Tensor:
            tensor, part = tensors[name]
            if not isinstance(part, gguf.ReaderTensor):
                return _Stored(tensor, part, name, config, halves)
            return deepseek2.UpProjections(*(_Stored(of, None, name, config, halves) for of in (tensor, part)))

        params = weights.build_params(config, get, dtype, int8=int8, shardings=shardings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, params, tokenizer


class _Reader(gguf.GGUFReader):
    """Reads the file through a plain array: indexing a `np.memmap`, a million times for a large vocabulary, is slow."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


def _open(path: pathlib.Path) -> gguf.GGUFReader:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("This is not a GGUF file.")
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        # The reader slices past the end without a check: a short file shows as whatever breaks first.
        raise ValueError(f"The file is truncated or damaged ({error}).") from error


def _architecture(metadata: dict[str, Any]) -> str:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {architecture!r}, supported: {', '.join(ARCHITECTURES)}.")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(f"split.count is {metadata['split.count']!r}, expected a model in one file.")
    return architecture


def _config_fields(architecture: str, metadata: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The config.json that the metadata stands for."""
    prefix = f"{architecture}."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}

    def refuse(key: str, expected: str = "which this decoder does not support"):
        raise ValueError(f"{prefix}{key} is {given[key]!r}, {expected}.")

    used, neutral, latent = _USED | _SCALING, _NEUTRAL, architecture == deepseek2.ARCHITECTURE
    if architecture in _LOCAL_LAYERS:
        used = used | _LOCAL_LAYERS[architecture]
    if latent:
        used, neutral = used | deepseek2.KEYS, neutral | deepseek2.NEUTRAL
    for key, value in given.items():
        if key in _INTEGERS and not isinstance(value, int):  # some families give one value per layer
            refuse(key, "expected one integer")
        if key not in used and (key not in neutral or value != neutral[key]):
            refuse(key)
    epsilon = f"attention.layer_norm{'' if architecture == 'gptneox' else '_rms'}_epsilon"
    for key, kind in ((epsilon, "a float"), *((key, "an integer") for key in _REQUIRED)):
        if key not in given:
            raise ValueError(f"{prefix}{key} is missing, expected {kind}.")
    for key in (*_REQUIRED, "attention.key_length", "attention.value_length"):
        if key in given and (not isinstance(given[key], int) or given[key] < 1):
            refuse(key, "expected an integer of at least 1")
    for key in ("rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if key in given:
            positive(f"{prefix}{key}", given[key])
    if not isinstance(given.get("rope.dimension_count", 0), int):
        refuse("rope.dimension_count", "expected an integer")

    fields = _DEFAULTS | {field: given[key] for key, field in _FIELDS.items() if key in given}
    fields["tie_word_embeddings"] = "output.weight" not in stored
    fields.setdefault("vocab_size", len(read_list(metadata, "tokens", str)))
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    if heads and width and not latent:
        head_dim = fields.setdefault("head_dim", width // heads)
        rotated = given.get("rope.dimension_count", head_dim)
        if given.get("attention.value_length", head_dim) != head_dim:
            refuse("attention.value_length", f"expected the head dimension, {head_dim}")
        fields["rotary_pct"] = rotated / head_dim  # what GPT-NeoX calls partial_rotary_factor
        if rotated != head_dim:
            if architecture not in ("phi3", "gptneox"):
                refuse("rope.dimension_count", f"expected the head dimension, {head_dim}")
            fields["partial_rotary_factor"] = rotated / head_dim
    if architecture == "llama":
        architecture = _llama_or_mistral(fields)
    else:
        fields["architectures"] = [ARCHITECTURES[architecture]]
    if architecture == "qwen3moe":
        fields["norm_topk_prob"] = True  # llama.cpp always divides
        fields["intermediate_size"] = fields.get("intermediate_size", fields.get("moe_intermediate_size"))
    if architecture in ("gemma2", "gemma3"):
        # What llama.cpp derives: 1 / sqrt(H), but for the largest of each generation.
        largest = fields.get("num_hidden_layers") == {"gemma2": 46, "gemma3": 62}[architecture]
        fields["query_pre_attn_scalar"] = width // heads if largest else fields["head_dim"]
        fields["rope_local_base_freq"] = given.get("rope.freq_base_swa", 10000.0)
        if (local := given.get(_PATTERN)) is not None:
            fields["layer_types"] = _layer_types(local, fields.get("num_hidden_layers"), refuse)
    if architecture == "qwen2":
        fields.pop("sliding_window", None)
    if latent:
        fields |= deepseek2.fields(given)
    scaling = _scaling(given, stored, fields.get("head_dim", 0), refuse)
    if latent and scaling:
        scaling = scaling | deepseek2.yarn(given)
        scaling.pop("attention_factor")
    if scaling:
        fields["rope_scaling"] = scaling
    return fields


def _layer_types(pattern: int | list[bool], layers: int, refuse) -> list[str]:
    """layer_types of config.json: all layers but every n-th are local, or those that a list names."""
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        local = [pattern == 0 or (i + 1) % pattern > 0 for i in range(layers)]
    elif isinstance(pattern, list) and len(pattern) == layers:
        local = list(map(bool, pattern))
    else:
        refuse(_PATTERN, f"expected an integer or {layers} booleans")
    return ["sliding_attention" if one else "full_attention" for one in local]


def _llama_or_mistral(fields: dict[str, Any]) -> str:
    """Decides which of the architectures that llama.cpp calls llama it is."""
    if fields.get("num_experts"):
        fields["architectures"], fields["num_local_experts"] = ["MixtralForCausalLM"], fields["num_experts"]
        return "mixtral"
    fields["architectures"] = ["MistralForCausalLM" if fields.get("sliding_window") else "LlamaForCausalLM"]
    return "llama"


def _scaling(given: dict[str, Any], stored: dict[str, Any], head_dim: int, refuse) -> dict[str, Any]:
    """rope_scaling of config.json, from metadata and from the tensors that hold divisors."""
    kind = given.get("rope.scaling.type", "none")
    read = lambda name: np.array(stored[name].data, np.float32).reshape(-1).tolist()
    if "rope_factors_short.weight" in stored and "rope_factors_long.weight" in stored:
        long, short = read("rope_factors_long.weight"), read("rope_factors_short.weight")
        gain = given.get("rope.scaling.attn_factor")
        return {"type": "longrope", "long_factor": long, "short_factor": short, "attention_factor": gain}
    if kind not in ("none", "linear", "yarn") or (kind != "none" and "rope_freqs.weight" in stored):
        refuse("rope.scaling.type")
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if kind != "yarn" and given.get(key, 1.0) != 1.0:
            refuse(key, "expected 1.0 without yarn")
    if "rope_freqs.weight" in stored:  # Llama 3.1: a divisor of every frequency, whatever the context
        divisors, pairs = read("rope_freqs.weight"), head_dim // 2
        if len(divisors) != pairs:
            raise ValueError(f"Tensor rope_freqs.weight has {len(divisors)} numbers, expected {pairs}.")
        every = {"long_factor": divisors, "short_factor": divisors, "attention_factor": 1.0}
        return every | {"type": "longrope", "original_max_position_embeddings": given["context_length"]}
    if kind == "linear":
        return {"type": "linear", "factor": given.get("rope.scaling.factor")}
    if kind == "yarn":
        yarn = {name: given.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        # One key is config.json's attention_factor; llama.cpp multiplies the other with the gain of the scaling.
        gain = given.get("rope.scaling.yarn_attn_factor", yarn_gain(given.get("rope.scaling.factor", 1.0)))
        gain *= given.get("rope.scaling.attn_factor", 1.0)
        return yarn | {"type": "yarn", "factor": given.get("rope.scaling.factor"), "attention_factor": gain}
    if "rope.scaling.factor" in given:
        refuse("rope.scaling.factor")
    return {}


def _hf_tensors(architecture: str, config: DecoderConfig, stored: dict[str, Any]) -> dict[str, Any]:
    """By the Hugging Face name of a tensor, or its own where it has none: the tensor, and which expert's part it is.

    The up-projection of latent attention may be two tensors; the second is that of the values.
    """
    parts = _BLOCKS.get(architecture, _BLOCK)
    top, layer = (_NEOX_TOP, "gpt_neox.layers.") if architecture == "gptneox" else (_TOP, "model.layers.")
    rename = _MIXTRAL if config.names == "mixtral" else {}
    found = {}
    for name, tensor in stored.items():
        stem, _, suffix = name.rpartition(".")
        block, _, part = stem.removeprefix("blk.").partition(".")
        at = f"{layer}{block}."
        if name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
            continue  # in the config
        if stem in top:
            found[f"{top[stem]}.{suffix}"] = tensor, None
        elif stem.startswith("blk.") and part in parts:
            found[f"{at}{rename.get(parts[part], parts[part])}.{suffix}"] = tensor, None
        elif part == deepseek2.UP_OF_KEYS and f"blk.{block}.{deepseek2.UP_OF_VALUES}.{suffix}" in stored:
            of_values = stored[f"blk.{block}.{deepseek2.UP_OF_VALUES}.{suffix}"]
            found.setdefault(f"{at}{deepseek2.UP}.{suffix}", (tensor, of_values))
        elif part == deepseek2.UP_OF_VALUES:
            continue  # beside the keys'
        elif stem.startswith("blk.") and part in _EXPERTS:
            of_expert = rename.get(_EXPERTS[part], _EXPERTS[part])
            for expert in range(config.num_experts):
                found[f"{at}{of_expert.format(expert)}.{suffix}"] = tensor, expert
        else:
            found[name] = tensor, None
    return found


class _Stored:
    """A tensor of the file in Hugging Face's order of rows, with its norms; only what is asked for is dequantized."""

    dtype = np.dtype(np.float32)

    def __init__(self, tensor: gguf.ReaderTensor, expert: int | None, name: str, config: DecoderConfig, halves: bool):
        self._tensor, self._data = tensor, tensor.data if expert is None else tensor.data[expert]
        self.shape = tuple(int(size) for size in reversed(tensor.shape))[0 if expert is None else 1 :]
        self._order = None
        if halves and ".q_proj." in name:
            self._order = _halves(self.shape[0], config.num_heads)
        elif halves and ".k_proj." in name:
            self._order = _halves(self.shape[0], config.num_kv_heads)
        elif ".query_key_value." in name:  # queries of all heads, keys of all, values of all: back to head after head
            apart = np.arange(self.shape[0]).reshape(3, config.num_heads, -1)
            self._order = apart.swapaxes(0, 1).reshape(-1)
        self._offset = np.float32(NAMES[config.names].norm_offset if name.endswith("norm.weight") else 0.0)

    def __getitem__(self, index: slice | Index) -> np.ndarray:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        data = self._data[rows if self._order is None else self._order[rows]]
        try:
            array = gguf.quants.dequantize(data, self._tensor.tensor_type)[(slice(None), *columns)]
        except NotImplementedError as error:
            kind = self._tensor.tensor_type.name
            raise ValueError(f"Tensor {self._tensor.name} is {kind}, which cannot be dequantized.") from error
        return array - self._offset if self._offset else array


def _halves(rows: int, heads: int) -> np.ndarray | None:
    """The order of rows that turns the rotary pairs (0, 1), (2, 3), ... of each head into (0, H/2), (1, H/2 + 1), ...

    llama.cpp rotates neighbouring channels of this architecture and its converter permutes W_q and W_k to match; here
    the first half of a head rotates with the second.
    """
    if rows % (2 * heads):
        return None  # a wrong shape: build_params reports it with the name
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
