"""Arrays in a folder written with orbax, and a JSON file beside them that says what they are: all of it or nothing."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils


def save(
    folder: pathlib.Path,
    arrays: Any,
    file: str,
    about: dict[str, Any],
    beside: Callable[[pathlib.Path], None] = lambda staging: None,
) -> None:
    """Replaces a folder, which all processes of a program see; each writes its own shards.

    Args:
      folder: where; its parents are made.
      arrays: a pytree.
      file: the name of the JSON file.
      about: its content.
      beside: writes whatever else belongs there into the folder it is given.
    """
    import orbax.checkpoint as ocp  # slow to import, and few programs need it

    several = jax.process_count() > 1
    first = jax.process_index() == 0
    # Processes must agree on a name. One alone does not meet another program that writes the same folder.
    staging = folder.with_name(f".{folder.name}.{'all' if several else os.getpid()}")
    meet = multihost_utils.sync_global_devices if several else lambda _: None
    try:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        meet(f"{staging} is made")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(staging / "arrays", arrays)
        if first:
            (staging / file).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            beside(staging)
            shutil.rmtree(folder, ignore_errors=True)
            staging.rename(folder)
        meet(f"{folder} is there")
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)


def load(folder: pathlib.Path, like: Any) -> Any:
    """The arrays of a folder.

    Args:
      folder: absolute.
      like: their tree as `jax.ShapeDtypeStruct`s, whose dtypes and shardings the result has.

    Raises:
      ValueError: what is there is damaged.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "arrays", like)
    except Exception as error:  # orbax raises what its storage raises
        raise ValueError(f"{folder} is damaged ({str(error).splitlines()[0]}).") from error
