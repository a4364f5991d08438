"""Decoders from Hugging Face directories: config.json, safetensors and tokenizer.json."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import tokenizers

from models import weights
from models.config import DecoderConfig
from models.tokenizer import Tokenizer, stop_ids

ARCHITECTURES = ("LlamaForCausalLM",)

# Fields that must be absent, null or have this value: any other asks for something this decoder does not do.
_NEUTRAL = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "sliding_window": None,
    "use_sliding_window": False,
}


def load_directory(
    path: str | pathlib.Path, dtype, name: str | None = None
) -> tuple[DecoderConfig, dict[str, Any], Tokenizer]:
    """Loads a decoder, its weights and its tokenizer.

    Args:
      path: a directory with config.json, tokenizer.json and *.safetensors, in one file or sharded.
      dtype: of the params.
      name: of the model; by default the directory's.

    Returns:
      The config, the params of `models.weights`, and the tokenizer.

    Raises:
      ValueError: a file is missing or damaged, or this decoder would not compute the model faithfully; the message
        opens with the path.
    """
    path = pathlib.Path(path)
    try:
        fields = _read_json(path / "config.json")
        config = _read_config(name or path.resolve().name, fields)
        tokenizer = _read_tokenizer(path, fields)
        with contextlib.ExitStack() as stack:
            names, get = _open_tensors(path, stack)
            weights.check_names(config, names)
            params = weights.build_params(config, get, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, params, tokenizer


def _read_json(file: pathlib.Path, required: bool = True) -> dict[str, Any]:
    if not file.is_file():
        if required:
            raise ValueError(f"{file.name} is missing.")
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is not valid JSON: {error}") from error


def _read_config(name: str, fields: Mapping[str, Any]) -> DecoderConfig:
    architectures = fields.get("architectures") or ["none"]
    if architectures[0] not in ARCHITECTURES:
        raise ValueError(f"architectures is {architectures}, supported: {', '.join(ARCHITECTURES)}.")
    for key, neutral in _NEUTRAL.items():
        if fields.get(key) not in (None, neutral):
            raise ValueError(f"{key} is {fields[key]!r}, expected {neutral!r}.")
    if other := set(fields.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types has {sorted(other)}, expected only 'full_attention'.")

    def size(key: str, default: int | None = None) -> int:
        value = default if fields.get(key) is None else fields[key]
        if not isinstance(value, int):
            raise ValueError(f"{key} is {value!r}, expected an integer.")
        return value

    heads = size("num_attention_heads")
    # Defaults are those of transformers' LlamaConfig.
    return DecoderConfig(
        name=name,
        vocab_size=size("vocab_size"),
        num_layers=size("num_hidden_layers"),
        width=size("hidden_size"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", size("hidden_size") // heads),
        ffn_width=size("intermediate_size"),
        rope_base=_rope_base(fields),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        max_positions=size("max_position_embeddings", 2048),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def _rope_base(fields: Mapping[str, Any]) -> float:
    """Reads rope_theta (transformers 4) or rope_parameters (transformers 5), and refuses any scaling."""
    base = fields.get("rope_theta") or 10000.0
    for key in ("rope_scaling", "rope_parameters"):
        rope = dict(fields.get(key) or {})
        base = rope.pop("rope_theta", None) or base
        kinds = {rope.pop("type", None), rope.pop("rope_type", None)}
        others = {name: value for name, value in rope.items() if value is not None}
        if others.get("partial_rotary_factor") == 1.0:
            del others["partial_rotary_factor"]
        if kinds - {None, "default"} or others:
            raise ValueError(f"{key} is {fields[key]}, expected plain rotary positions (rope_type 'default').")
    return float(base)


def _open_tensors(
    path: pathlib.Path, stack: contextlib.ExitStack
) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """Opens every shard and returns the names of all tensors, and a function from name to array."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shard_of = _read_json(index).get("weight_map")
        if not isinstance(shard_of, dict):
            raise ValueError(f"weight_map of {index.name} is missing.")
        shards = sorted(set(shard_of.values()))
    else:
        shards = sorted(file.name for file in path.glob("*.safetensors"))
        if not shards and (any(path.glob("*.bin")) or any(path.glob("*.pt*"))):
            raise ValueError(
                "The weights are pickled, and unpickling runs whatever code the file holds: "
                "save them as safetensors, the only format read here."
            )
        if len(shards) != 1:
            raise ValueError(f"Found {len(shards)} *.safetensors without {index.name}, expected one.")

    source = {}
    for shard in shards:
        file = path / shard
        if not file.is_file():
            raise ValueError(f"{shard}, named by {index.name}, is missing.")
        try:
            handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{shard} is truncated or not a safetensors file ({error}).") from error
        source.update(dict.fromkeys(handle.keys(), handle))

    # A KeyError here is a tensor that no shard holds; build_params names it.
    return list(source), lambda name: source[name].get_tensor(name)


def _read_tokenizer(path: pathlib.Path, fields: Mapping[str, Any]) -> Tokenizer:
    """Reads tokenizer.json and what stands beside it.

    The chat template is chat_template.jinja, else `chat_template` of tokenizer_config.json. The tokens that end a turn
    are the union of what generation_config.json, config.json and tokenizer_config.json declare and the known ends.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError("tokenizer.json is missing (a SentencePiece tokenizer.model alone is not supported).")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.json cannot be read: {error}") from error
    # Some files carry the truncation and padding of a training run.
    backend.no_truncation()
    backend.no_padding()

    def named(token: Any) -> int | None:  # a string, or {"content": string}
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else backend.token_to_id(text)

    settings = _read_json(path / "tokenizer_config.json", required=False)
    generation = _read_json(path / "generation_config.json", required=False)
    ends = []
    for declared in (generation.get("eos_token_id"), fields.get("eos_token_id"), named(settings.get("eos_token"))):
        ends += declared if isinstance(declared, list) else [declared]
    bos_id = named(settings.get("bos_token"))

    jinja = path / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return Tokenizer(
        backend=backend,
        chat_template=template,
        bos_id=fields.get("bos_token_id") if bos_id is None else bos_id,
        eos_ids=stop_ids(backend, ends),
    )
