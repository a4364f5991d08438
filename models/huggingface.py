"""Decoders from Hugging Face directories: config.json, safetensors and tokenizer.json."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers

from models import sentencepiece, tekken, weights
from models.config import DecoderConfig
from models.families import TEXT_TOWERS, read_config
from models.leaf import Index, Tensor
from models.params import DecoderParams
from models.tokenizer import Tokenizer, stop_ids

# As safetensors calls them; what weights may not be is named in errors.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def load_directory(
    path: str | pathlib.Path,
    dtype,
    name: str | None = None,
    *,
    context: int | None = None,
    int8: bool = False,
    shardings: weights.Shardings | None = None,
) -> tuple[DecoderConfig, DecoderParams, Tokenizer]:
    """Loads a decoder, its weights and its tokenizer.

    Args:
      path: a directory with config.json, tokenizer.json and *.safetensors, in one file or sharded.
      dtype: of the params.
      name: of the model; by default the directory's.
      context: tokens the caller needs, see `models.families.read_config`.
      int8: see `models.weights.build_params`.
      shardings: see `models.weights.build_params`.

    Returns:
      The config, the params of `models.weights`, and the tokenizer.

    Raises:
      ValueError: a file is missing or damaged, or this decoder would not compute the model faithfully; the message
        opens with the path.
    """
    path = pathlib.Path(path)
    try:
        fields = _read_json(path / "config.json")
        config = read_config(name or path.resolve().name, fields, context)
        tokenizer = _read_tokenizer(path, {**(fields.get("text_config") or {}), **fields})
        with contextlib.ExitStack() as stack:
            names, get = _open_tensors(path, stack)
            if (fields.get("architectures") or [None])[0] in TEXT_TOWERS:
                names, get = _of_text_tower(names, get)
            weights.check_names(config, names)
            params = weights.build_params(config, get, dtype, int8=int8, shardings=shardings)
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


def _open_tensors(
    path: pathlib.Path, stack: contextlib.ExitStack
) -> tuple[list[str], Callable[[str], Tensor]]:
    """Opens every shard and returns the names of all tensors, and a function from name to tensor."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        shards = ["model.safetensors"]  # whatever lies beside it: adapters, the same weights in another format
    elif index.is_file():
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
        if len(shards) != 1 or shards[0].startswith(("adapter_", "consolidated")):
            found = ", ".join(shards) or "none"
            raise ValueError(f"Expected model.safetensors or {index.name}, found of *.safetensors: {found}.")

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
    return list(source), lambda name: _Stored(source[name].get_slice(name))


def _of_text_tower(names: list[str], get: Callable[[str], Tensor]) -> tuple[list[str], Callable[[str], Tensor]]:
    """Keeps the language model of a model of images and text, under the names that it has alone."""
    stored = {}
    for name in names:
        # `language_model.model.layers.0` and `language_model.lm_head`, since 2025 `model.language_model.layers.0`
        # and `lm_head`.
        short = name.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        if not short.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector.")):
            stored[short] = name
    return list(stored), lambda name: get(stored[name])


class _Stored:
    """A tensor of a file, of which only what is asked for is read."""

    def __init__(self, slices):
        self._slices = slices
        self.shape = tuple(slices.get_shape())
        name = slices.get_dtype()
        self.dtype = np.dtype(_DTYPES[name]) if name in _DTYPES else np.dtype(np.void)

    def __getitem__(self, index: slice | Index) -> np.ndarray:
        return self._slices[index]


def _read_tokenizer(path: pathlib.Path, fields: Mapping[str, Any]) -> Tokenizer:
    """Reads tokenizer.json and what stands beside it.

    The chat template is chat_template.jinja, else `chat_template` of tokenizer_config.json. The tokens that end a turn
    are the union of what generation_config.json, config.json and tokenizer_config.json declare and the known ends.
    """
    settings = _read_json(path / "tokenizer_config.json", required=False)
    backend = _read_backend(path, settings, fields)
    # Some files carry the truncation and padding of a training run.
    backend.no_truncation()
    backend.no_padding()

    def named(token: Any) -> int | None:  # a string, or {"content": string}
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else backend.token_to_id(text)

    generation = _read_json(path / "generation_config.json", required=False)
    ends = []
    for declared in (generation.get("eos_token_id"), fields.get("eos_token_id"), named(settings.get("eos_token"))):
        ends += declared if isinstance(declared, list) else [declared]
    bos_id = named(settings.get("bos_token"))

    jinja = path / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    bos_id = fields.get("bos_token_id") if bos_id is None else bos_id
    opening = backend.encode("").ids[:1]  # what the file's post-processor writes before a text
    if not (path / "tokenizer.json").is_file() and bos_id is not None and settings.get("add_bos_token", True):
        opening = [bos_id]
    return Tokenizer(
        backend=backend,
        chat_template=template,
        bos_id=bos_id,
        eos_ids=stop_ids(backend, ends),
        opening=(bos_id,) if opening == [bos_id] else (),
    )


def _read_backend(
    path: pathlib.Path, settings: Mapping[str, Any], fields: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Reads tokenizer.json, else Mistral's tekken.json, else SentencePiece's tokenizer.model."""
    if (path / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
    if (path / "tekken.json").is_file():
        return tekken.backend(_read_json(path / "tekken.json"))
    if (path / "tokenizer.model").is_file():
        vocabulary = sentencepiece.read_model((path / "tokenizer.model").read_bytes())
        if settings.get("add_prefix_space") is False:
            vocabulary = vocabulary._replace(space_first=False)
        # Without the setting transformers takes the classes of Llama as new and what it has no class for as legacy.
        legacy = settings.get("legacy", (fields.get("architectures") or [""])[0] != "LlamaForCausalLM")
        built = sentencepiece.backend(vocabulary._replace(space_after_specials=bool(legacy)))
        _add_tokens(built, path, settings)
        return built
    raise ValueError("tokenizer.json is missing, and so are tekken.json and tokenizer.model.")


def _add_tokens(backend: tokenizers.Tokenizer, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Adds the tokens that stand beside a tokenizer.model, each under the id that the files give it."""
    declared = settings.get("added_tokens_decoder")
    if declared is None:
        older = _read_json(path / "added_tokens.json", required=False)
        declared = {i: {"content": token} for token, i in older.items()}
    for i, token in sorted((int(i), token) for i, token in declared.items()):
        flags = {flag: token.get(flag, False) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        if (found := backend.token_to_id(token["content"])) != i:
            raise ValueError(f"added_tokens_decoder gives {token['content']!r} the id {i}, tokenizer.model {found}.")
