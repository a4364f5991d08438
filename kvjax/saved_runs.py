"""Sequences in progress on disk: a compressed cache is computed once and used again."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax

from kvjax import orbax_folder
from kvjax.drivers import Run
from kvjax.limits import Room

FILE = "kvjax_run.json"
_VERSION = 2


def save_run(folder: str | os.PathLike[str], run: Run, about: dict[str, Any] | None = None) -> None:
    """Writes a run; what was in the folder is replaced when everything is written.

    Args:
      folder: where. On a mesh of several processes all of them call this, and see the same folder.
      run: what `prefill`, `extend` or `generate` returned, outside of jit.
      about: said by `load_run` where it refuses: the model, the method, the text.
    """
    orbax_folder.save(pathlib.Path(folder).absolute(), run, FILE, describe(run, about))


def load_run(folder: str | os.PathLike[str], like: Run) -> Run:
    """Reads what `save_run` wrote.

    Args:
      folder: where.
      like: the shapes that it has, from `jax.eval_shape` of the prefill that made it. Inside `use_mesh` every leaf
        comes to the devices that hold it, whatever mesh it was saved from; meshes that round slots differently
        (`sharding.whole`) make other shapes. What it has room for is read, not compared.

    Raises:
      ValueError: there is none, it is damaged, or another model or method made it: names the first leaf or static
        field that differs.
    """
    folder = pathlib.Path(folder).absolute()
    try:
        described = json.loads((folder / FILE).read_text(encoding="utf-8"))
        room = check_described(described, like, str(folder))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {FILE} cannot be used ({error}).") from error
    return orbax_folder.load(folder, like.placed())._replace(room=room)


def describe(run: Run, about: dict[str, Any] | None) -> dict[str, Any]:
    """Returns what a run is beside its arrays, as JSON can write it: see `check_described`."""
    return {
        "version": _VERSION,
        "about": about or {},
        "leaves": {path: [str(x.dtype), *x.shape] for path, x in leaves_of(run).items()},
        "static": _static(run._replace(room=None)),
        "room": dataclasses.asdict(run.room),
    }


def check_described(described: dict[str, Any], like: Run, where: str) -> Room:
    """Checks that what `describe` returned is a run like another, and returns the room that it has.

    Raises:
      ValueError: it is not: names the first leaf or static field that differs.
      KeyError: something is missing, or (TypeError) of another kind.
    """
    if described["version"] != _VERSION:
        raise ValueError(f"{where} is of version {described['version']}, expected {_VERSION}.")
    there = {path: _shape(leaf) for path, leaf in described["leaves"].items()} | described["static"]
    room = Room(**described["room"])
    wanted = {path: _shape((x.dtype, *x.shape)) for path, x in leaves_of(like).items()}
    wanted |= _static(like._replace(room=None))
    there[".room.method"], wanted[".room.method"] = room.method, like.room.method
    for path in sorted(there.keys() | wanted.keys()):
        if there.get(path) != wanted.get(path):
            said = ", ".join(f"{name} {value}" for name, value in described["about"].items())
            raise ValueError(
                f"{where} holds another run{f' ({said})' if said else ''}: {path} is {there.get(path, 'missing')}, "
                f"expected {wanted.get(path, 'none')}."
            )
    return room


def leaves_of(run: Run) -> dict[str, Any]:
    """Returns the arrays of a run by their paths."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(run)}


def _static(tree: Any, path: str = "") -> dict[str, str]:
    """Returns what is not an array: the class of every node and its static fields, which say how arrays are read."""
    found = {}
    if dataclasses.is_dataclass(tree):
        found[f"{path} kind"] = type(tree).__name__
        parts = {}
        for field in dataclasses.fields(tree):
            value = getattr(tree, field.name)
            if field.metadata.get("pytree_node", True):
                parts[f".{field.name}"] = value
            else:
                found[f"{path}.{field.name}"] = repr(value)
    elif isinstance(tree, dict):
        parts = {f"[{key!r}]": value for key, value in tree.items()}
    elif isinstance(tree, tuple | list):
        names = getattr(tree, "_fields", None)
        parts = {f".{names[i]}" if names else f"[{i}]": value for i, value in enumerate(tree)}
    else:
        parts = {}
    for name, value in parts.items():
        found |= _static(value, path + name)
    return found


def _shape(leaf: Any) -> str:
    return f"{leaf[0]}{list(leaf[1:])}"
