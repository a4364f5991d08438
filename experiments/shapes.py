"""Shapes of models without their weights: what plans and timings of untrained weights start from."""

from __future__ import annotations

import json
import pathlib

from experiments.suggestions import there_are
from models.config import DecoderConfig
from models.families import read_config

MODELS_DIR = pathlib.Path(__file__).parent.parent / "configs" / "models"


def model_names() -> list[str]:
    """Names of the files in configs/models."""
    return sorted(path.stem for path in MODELS_DIR.glob("*.json"))


def read_model(name: str, context: int | None) -> DecoderConfig:
    """The shape of a model: a name of `model_names()`, or the path of a config.json or of the directory it is in.

    `context`: tokens that will be read, for models whose rotary frequencies depend on them; None: as first trained.

    Raises:
      ValueError: there is no such model, with those there are; or a config that the decoder does not follow.
    """
    path = pathlib.Path(name).expanduser()
    if name in model_names():
        path = MODELS_DIR / f"{name}.json"
    elif path.is_dir():
        path /= "config.json"
    if not path.is_file():
        known = there_are(name, model_names())
        raise ValueError(f"--model: no shape {name!r}, and no path of a config.json; {known}")
    try:
        fields = json.loads(path.read_text("utf-8-sig"))
        of_file = path.resolve()
        return read_config(of_file.parent.name if of_file.name == "config.json" else of_file.stem, fields, context)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--model: {path} cannot be used: {error}") from error
