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
from models.families import TEXT_TOWERS, architecture_of, read_config
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
        config = _read_config(name or path.resolve().name, fields, context)
        fields = {**(fields.get("text_config") or {}), **fields}
        tokenizer = _read_tokenizer(path, fields, config.vocab_size)
        with contextlib.ExitStack() as stack:
            names, get = _open_tensors(path, stack)
            if architecture_of(fields) in TEXT_TOWERS:
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
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is {_kind(content)}, expected an object.")
    return content


def _kind(value: Any) -> str:
    """Names the JSON type of a value."""
    names = {list: "an array", str: "a string", dict: "an object", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _read_config(name: str, fields: Mapping[str, Any], context: int | None) -> DecoderConfig:
    try:
        return read_config(name, fields, context)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}, in config.json.") from error


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
        if wrong := [name for name, shard in shard_of.items() if not isinstance(shard, str)]:
            raise ValueError(f"weight_map of {index.name} gives {wrong[0]} no file name.")
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


def _read_tokenizer(path: pathlib.Path, fields: Mapping[str, Any], rows: int) -> Tokenizer:
    """Reads tokenizer.json and what stands beside it.

    The tokens that end a turn are the union of what generation_config.json, config.json and tokenizer_config.json
    declare and the known ends. What templates read as `eos_token` is what tokenizer_config.json calls so, as in
    transformers.

    Args:
      path: the directory.
      fields: of config.json.
      rows: of the embedding; ids that files declare are below it or in the vocabulary.
    """
    settings = _read_json(path / "tokenizer_config.json", required=False)
    backend = _read_backend(path, settings, fields)
    # Some files carry the truncation and padding of a training run.
    backend.no_truncation()
    backend.no_padding()
    size = max(rows, backend.get_vocab_size())

    named = _named_tokens(settings)
    id_of = lambda role: backend.token_to_id(named[role]) if role in named else None
    generation = _read_json(path / "generation_config.json", required=False)
    ends = [
        *_token_ids("generation_config.json", "eos_token_id", generation, size),
        *_token_ids("config.json", "eos_token_id", fields, size),
        id_of("eos_token"),
    ]
    eos_ids, bos_id = stop_ids(backend, ends), id_of("bos_token")
    if bos_id is None:
        bos_id = next(iter(_token_ids("config.json", "bos_token_id", fields, size)), None)
    opening = backend.encode("").ids[:1]  # what the file's post-processor writes before a text
    if not (path / "tokenizer.json").is_file() and bos_id is not None and settings.get("add_bos_token", True):
        opening = [bos_id]
    if settings.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        # Other classes have defaults of their own where the file leaves a token out; null is none.
        for role, token_id in (("bos_token", bos_id), ("eos_token", next(iter(eos_ids), None))):
            if role not in settings and token_id is not None:
                named[role] = backend.id_to_token(token_id) or ""
    templates = _read_templates(path, settings)
    return Tokenizer(
        backend=backend,
        chat_template=templates.pop("default", None),
        bos_id=bos_id,
        eos_ids=eos_ids,
        opening=(bos_id,) if opening == [bos_id] else (),
        named_templates=templates,
        template_tokens=named,
    )


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens of tokenizer_config.json by role, each written as a string or {"content": string}."""
    found = {}
    for role in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        if not isinstance(token, str):
            raise ValueError(f"{role} of tokenizer_config.json is {token!r}, expected a string.")
        found[role] = token
    return found


def _token_ids(file: str, field: str, fields: Mapping[str, Any], size: int) -> list[int]:
    """Returns the ids that a field declares: one, several, or none."""
    declared = fields.get(field)
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size:
            raise ValueError(f"{field} of {file} is {declared!r}, expected token ids from 0 to {size - 1}.")
    return ids


def _read_templates(path: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns chat templates by name: of chat_template.jinja and additional_chat_templates/, else of the settings."""
    files = {"default": path / "chat_template.jinja"} if (path / "chat_template.jinja").is_file() else {}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    given = settings.get("chat_template")
    if given is None or isinstance(given, str):
        return {} if given is None else {"default": given}
    expected = "expected a string, or a list of objects with name and template"
    if not isinstance(given, list):
        raise ValueError(f"chat_template of tokenizer_config.json is {_kind(given)}, {expected}.")
    for i, entry in enumerate(given):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise ValueError(f"chat_template[{i}] of tokenizer_config.json has no name or no template, {expected}.")
    return {entry["name"]: entry["template"] for entry in given}


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8: {error}.") from error


def _read_backend(
    path: pathlib.Path, settings: Mapping[str, Any], fields: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Reads tokenizer.json, else Mistral's tekken.json, else SentencePiece's tokenizer.model."""
    if (path / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_str(_read_text(path / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
    if (path / "tekken.json").is_file():
        return tekken.backend(_read_json(path / "tekken.json"))
    if (path / "tokenizer.model").is_file():
        vocabulary = sentencepiece.read_model((path / "tokenizer.model").read_bytes())
        if settings.get("add_prefix_space") is False:
            vocabulary = vocabulary._replace(space_first=False)
        # Without the setting transformers takes the classes of Llama as new and what it has no class for as legacy.
        legacy = settings.get("legacy", architecture_of(fields) != "LlamaForCausalLM")
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
    if not isinstance(declared, dict) or not all(
        str(i).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for i, token in declared.items()
    ):
        raise ValueError("added_tokens_decoder of tokenizer_config.json, or added_tokens.json, maps no ids to tokens.")
    for i, token in sorted(((int(i), token) for i, token in declared.items()), key=lambda pair: pair[0]):
        flags = {flag: token.get(flag, False) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        if (found := backend.token_to_id(token["content"])) != i:
            raise ValueError(f"added_tokens_decoder gives {token['content']!r} the id {i}, tokenizer.model {found}.")
