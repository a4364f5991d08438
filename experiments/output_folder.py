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
      ValueError: --output_dir is missing, or holds something and --replace is not given, or another process writes
        there, or --replace is given where `fill`.
      OSError: there can be no such folder.
    """
    if cli.OUTPUT_DIR.value is None:
        raise ValueError(f"--output_dir says where the {what} goes; it is required.")
    if fill and _REPLACE.value:
        raise ValueError("--resume goes on with what --replace would discard; pass one of them.")
    folder = pathlib.Path(cli.OUTPUT_DIR.value)
    if not folder.exists():
        folder.mkdir(parents=True)  # where it cannot be, the system says so before anything is computed
        folder.rmdir()
    if (folder / folder_lock.FILE).exists():
        folder_lock.FolderLock(folder).close()  # refused where another process writes there
    held = {path.name for path in folder.iterdir()} - {folder_lock.FILE} if folder.exists() else set()
    if held and not fill and not _REPLACE.value:
        raise ValueError(f"--output_dir: {folder} is not empty; pass --replace to discard what it holds.")
    return folder
