"""Calibrations on disk: folders that remember which method and which model they belong to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measurements import Calibration, Settings, measure
from kvjax import orbax_folder
from models import Model
from models.assets import cache_dir

_LAYER_AXIS = {"rates": None, "key_ranks": 1, "value_ranks": 1}  # of all others it is the first
_LAYER_AXIS |= {f"{name}_levels{bits}": None for name in ("key", "value") for bits in (2, 3, 4)}
_LAYER_AXIS |= {"candidates": None, "pattern": None}  # of all layers: local ones read a prompt like the others
_VERSION = "v3"  # of what recipes measure: older ones are measured again

TRAINED = {
    "attention_gate": "attention_gate",
    "cskv_trained": "cskv",
    "duoattention_trained": "duoattention",
    "lococo": "lococo",
    "locret": "locret",
    "matryoshka_trained": "matryoshka",
    "reasoncache": "prefix",
}
"""What `experiments.train` makes, and the NAME of configs/runs/train_NAME.gin that makes it."""


def fingerprint(model: Model) -> str:
    """Hashes the decoder's shape and all its weights: a calibration is of no use to another model.

    Every element counts, with its place, so that no part of a layer can change unseen; rounded to bfloat16, so that a
    copy in float32 has the fingerprint of its bfloat16 original. Of the config counts what differs from its defaults: a
    calibration stays valid when the decoder learns something new.
    """
    fields = {field.name: field for field in dataclasses.fields(model.config) if field.name != "name"}
    shape = {name: getattr(model.config, name) for name, field in fields.items()}
    shape = {name: value for name, value in shape.items() if value != fields[name].default}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    leaves = jax.tree_util.tree_flatten_with_path(model.params.to_dict())[0]
    sums = jax.device_get([_checksum(x) for _, x in leaves])
    for (path, x), total in zip(leaves, sums):
        digest.update(f"{jax.tree_util.keystr(path)} {list(x.shape)} {int(total)}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """u32[]: the sum of all elements' bits, each times an odd hash of its place, modulo 2**32.

    Integers modulo 2**32 add up to the same in any order, so the sum depends neither on the device nor on how an array
    is split over several. An odd factor is invertible: the change of one element, less than 2**16, always shows. The
    factors differ by place, so that moved rows show too.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        # Rounded to bfloat16, ties to even, on integers: compilers may flush what is tiny in a cast.
        wide = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        bits = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
    else:
        bits = x.astype(jnp.uint32) & 0xFFFF
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * np.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = place * np.uint32(0x9E3779B1)
    mixed = (mixed ^ mixed >> 15) * np.uint32(0x85EBCA77)
    return (bits * ((mixed ^ mixed >> 13) | 1)).sum(dtype=jnp.uint32)


def save(
    folder: str | pathlib.Path, recipe: str, model: Model, data: Calibration, settings: Settings | Mapping[str, Any]
) -> None:
    """Writes a calibration with orbax, and what it is of beside it; all of it or nothing.

    Raises:
      ValueError: numbers that are not finite.
    """
    for name, x in data.items():
        if not np.all(np.isfinite(np.asarray(x, np.float32))):
            raise ValueError(
                f"{recipe}: {name} holds numbers that are not finite, so the weights or activations of "
                f"{model.config.name} are not."
            )
    if isinstance(settings, Settings):
        settings = dataclasses.asdict(settings)
    about = {
        "recipe": recipe,
        "model": model.config.name,
        "fingerprint": fingerprint(model),
        "settings": dict(settings),
        "shapes": {name: list(x.shape) for name, x in data.items()},
    }
    orbax_folder.save(pathlib.Path(folder).absolute(), dict(data), "calibration.json", about)


def load(folder: str | pathlib.Path, recipe: str, model: Model) -> Calibration:
    """Reads a calibration.

    Raises:
      ValueError: there is none, it is damaged, or it is of another method or model.
    """
    folder = pathlib.Path(folder).absolute()
    try:
        about = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"calibration.path: {folder} holds no calibration; make one with {_maker(recipe, folder)}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"calibration.path: {folder}/calibration.json is damaged ({error}).") from None
    kinds = {"recipe": str, "fingerprint": str, "model": str, "shapes": dict}
    for name, kind in kinds.items():
        if not isinstance(about, dict) or not isinstance(about.get(name), kind):
            raise ValueError(f"calibration.path: {folder}/calibration.json is damaged (it lacks {name}).")
    for part, shape in about["shapes"].items():
        if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
            raise ValueError(f"calibration.path: {folder}/calibration.json is damaged (the shape of {part} is none).")
    if about["recipe"] != recipe:
        raise ValueError(f"calibration.path: {folder} was made for {about['recipe']}, not for {recipe}.")
    if about["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"calibration.path: {folder} was measured on {about['model']} (fingerprint {about['fingerprint']}), not on "
            f"this {model.config.name} ({fingerprint(model)})."
        )
    like = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for name, shape in about["shapes"].items()}
    try:
        return orbax_folder.load(folder, like)
    except ValueError as error:
        raise ValueError(f"calibration.path: {error}") from error


def _maker(recipe: str, folder: pathlib.Path = pathlib.Path("DIR/trained")) -> str:
    """The command whose calibration lands in a folder."""
    if recipe in TRAINED:
        run = f"experiments.train --gin_file=configs/runs/train_{TRAINED[recipe]}.gin --output_dir={folder.parent}"
    else:
        run = f"experiments.calibrate --method={recipe} --output_dir={folder}"
    return f"python -m {run}"


class Calibrations:
    """What `calibration()` in a config stands for: the data of a recipe for one model, measured when missing."""

    def __init__(self, model: Model, settings: Settings | None = None):
        self._model = model
        self._settings = settings or Settings.of(model)

    def __call__(self, recipe: str, path: str | None) -> Calibration:
        """The calibration in `path`, or, for None, the one kept for this model.

        Where some layers have a sliding window it is of the others only, which are what a method then transforms.
        """
        found, config = self._load(recipe, path), self._model.config
        others = jnp.array([i for i in range(config.num_layers) if i not in config.local_layers], jnp.int32)
        if len(others) in (0, config.num_layers):
            return found

        def of_others(name: str, x: jax.Array) -> jax.Array:
            axis = _LAYER_AXIS.get(name, 0)
            return x if axis is None else jnp.take(x, others, axis=axis)

        return {name: of_others(name, x) for name, x in found.items()}

    def _load(self, recipe: str, path: str | None) -> Calibration:
        if path is not None:
            return load(path, recipe, self._model)
        if recipe in TRAINED:
            raise ValueError(f"calibration.path must name a folder that {_maker(recipe)} filled, got None.")
        name = f"{recipe}-{_VERSION}-{fingerprint(self._model)}-{self._settings.texts}x{self._settings.tokens}"
        folder = cache_dir() / "calibrations" / name
        if not (folder / "calibration.json").exists():
            print(f"{recipe} has no calibration for {self._model.config.name} yet; measuring one.", file=sys.stderr)
            data = measure(recipe, self._model, self._settings)
            save(folder, recipe, self._model, data, self._settings)
        return load(folder, recipe, self._model)
