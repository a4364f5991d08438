"""Decoders as orbax checkpoints: params ready to use, their config and their tokenizer."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import tokenizers

from kvjax import orbax_folder
from models.config import DecoderConfig
from models.int8 import Int8Matrix
from models.tokenizer import Tokenizer
from models.params import DecoderParams
from models.weights import Shardings, abstract_params, param_axes

FILE = "kvjax_model.json"
_VERSION = 1


def save_checkpoint(
    folder: str | pathlib.Path, config: DecoderConfig, params: DecoderParams, tokenizer: Tokenizer
) -> None:
    """Writes a model; what was in the folder is replaced when everything is written."""
    about = {
        "version": _VERSION,
        "int8": _is_int8(params),
        "config": dataclasses.asdict(config),
        "tokenizer": {
            "chat_template": tokenizer.chat_template,
            "bos_id": tokenizer.bos_id,
            "eos_ids": tokenizer.eos_ids,
            "opening": tokenizer.opening,
            "named_templates": dict(tokenizer.named_templates),
            "template_tokens": tokenizer.template_tokens and dict(tokenizer.template_tokens),
        },
    }
    write_tokenizer = lambda staging: tokenizer.backend.save(str(staging / "tokenizer.json"))
    orbax_folder.save(pathlib.Path(folder).absolute(), params.to_dict(), FILE, about, write_tokenizer)


def load_checkpoint(
    folder: str | pathlib.Path, dtype, *, int8: bool = False, shardings: Shardings | None = None
) -> tuple[DecoderConfig, DecoderParams, Tokenizer]:
    """Reads what `save_checkpoint` wrote.

    Args:
      folder: the checkpoint.
      dtype: of the params that are not in 8 bits.
      int8: the checkpoint must hold 8-bit matrices; one that does is also read without.
      shardings: see `models.weights.build_params`.

    Raises:
      ValueError: it is damaged, of another version, or holds no 8-bit matrices where `int8` wants them; the message
        opens with the path.
    """
    folder = pathlib.Path(folder).absolute()
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if about["version"] != _VERSION:
            raise ValueError(f"it is of version {about['version']}, expected {_VERSION}: convert the model again")
        fields = {name: tuple(x) if isinstance(x, list) else x for name, x in about["config"].items()}
        config = DecoderConfig(**fields)
        given = about["tokenizer"]
        tokenizer = Tokenizer(
            backend=tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
            chat_template=given["chat_template"],
            bos_id=given["bos_id"],
            eos_ids=tuple(given["eos_ids"]),
            opening=tuple(given["opening"]),
            named_templates=given.get("named_templates", {}),  # not in checkpoints of before
            template_tokens=given.get("template_tokens"),
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{folder}: {FILE} or tokenizer.json cannot be used ({error}).") from error
    if int8 and not about["int8"]:
        raise ValueError(f"{folder}: its matrices are not in 8 bits; convert the model with --int8.")
    like = abstract_params(config, dtype, int8=about["int8"])
    if shardings is not None:
        placed = shardings(param_axes(config, int8=about["int8"]), like)
        like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, placed)
    return config, DecoderParams.from_dict(orbax_folder.load(folder, like.to_dict())), tokenizer


def _is_int8(params: DecoderParams) -> bool:
    is_matrix = lambda x: isinstance(x, Int8Matrix)
    return any(map(is_matrix, jax.tree.leaves(params, is_leaf=is_matrix)))
