"""The folder that a program fills, and that it does not empty unasked."""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import cli, folder_lock

_REPLACE = flags.DEFINE_bool("replace", False, "Replace what output_dir holds.")


def output_folder(what: str, *, fill: bool = False) -> pathlib.Path:
    """Where --output_dir points.

    Args:
      what: the program writes, for messages.
      fill: it goes on with what the folder holds.

    Raises:
      ValueError: --output_dir is missing, or holds something and --replace is not given.
    """
    if cli.OUTPUT_DIR.value is None:
        raise ValueError(f"--output_dir says where the {what} goes; it is required.")
    folder = pathlib.Path(cli.OUTPUT_DIR.value)
    held = {path.name for path in folder.iterdir()} - {folder_lock.FILE} if folder.exists() else set()
    if held and not fill and not _REPLACE.value:
        raise ValueError(f"--output_dir: {folder} is not empty; pass --replace to discard what it holds.")
    return folder
