"""Sequences in progress on disk: a compressed cache is computed once and used again."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax

from kvjax import orbax_folder
from kvjax.drivers import Run

FILE = "kvjax_run.json"
_VERSION = 1


def save_run(folder: str | os.PathLike[str], run: Run, about: dict[str, Any] | None = None) -> None:
    """Writes a run; what was in the folder is replaced when everything is written.

    Args:
      folder: where. On a mesh of several processes all of them call this, and see the same folder.
      run: what `prefill`, `extend` or `generate` returned, outside of jit.
      about: said by `load_run` where it refuses: the model, the method, the text.
    """
    leaves = {path: [str(x.dtype), *x.shape] for path, x in _leaves(run).items()}
    described = {"version": _VERSION, "about": about or {}, "leaves": leaves}
    orbax_folder.save(pathlib.Path(folder).absolute(), run, FILE, described)


def load_run(folder: str | os.PathLike[str], like: Run) -> Run:
    """Reads what `save_run` wrote.

    Args:
      folder: where.
      like: the shapes that it has, from `jax.eval_shape` of the prefill that made it. Inside `use_mesh` every leaf
        comes to the devices that hold it, whatever mesh it was saved from; meshes that round slots differently
        (`sharding.whole`) make other shapes.

    Raises:
      ValueError: there is none, it is damaged, or another model or method made it: names the first leaf that differs.
    """
    folder = pathlib.Path(folder).absolute()
    try:
        described = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if described["version"] != _VERSION:
            raise ValueError(f"it is of version {described['version']}, expected {_VERSION}")
        there = {path: (dtype, *shape) for path, (dtype, *shape) in described["leaves"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {FILE} cannot be used ({error}).") from error
    wanted = {path: (str(x.dtype), *x.shape) for path, x in _leaves(like).items()}
    for path in sorted(there.keys() | wanted.keys()):
        if there.get(path) != wanted.get(path):
            said = ", ".join(f"{name} {value}" for name, value in described["about"].items())
            raise ValueError(
                f"{folder} holds another run{f' ({said})' if said else ''}: {path} is {_shape(there.get(path))}, "
                f"expected {_shape(wanted.get(path))}."
            )
    return orbax_folder.load(folder, like.placed())


def _leaves(run: Run) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(run)}


def _shape(leaf: tuple | None) -> str:
    return "missing" if leaf is None else f"{leaf[0]}{list(leaf[1:])}"
