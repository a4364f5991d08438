"""The folder of a training: its settings, metrics and checkpoints, and what it was when a run was cut off."""

from __future__ import annotations

import difflib
import errno
import json
import logging
import os
import pathlib
import reprlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.folder_lock import FolderLock

_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TrainingFolder:
    """Everything that a training needs to go on where it was, whatever stopped it.

    `training.json` says what is trained; `metrics.jsonl` has a line for every step; `checkpoints/` holds the last
    checkpoint and the best ones, written in the background. A checkpoint that was cut off while it was written does
    not count.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        about: dict[str, Any],
        *,
        keep: int,
        resume: bool,
        may_change: Mapping[str, Callable[[Any, int], None]] = {},
    ):
        """Opens a folder, or starts one.

        Args:
          folder: where.
          about: what decides the training, by name; must be what it was, but for what `may_change`.
          keep: best checkpoints that are kept beside the last one.
          resume: go on from the last complete checkpoint.
          may_change: names in `about`, and `(what it was, steps that are done)`, which raises where it may not.

        Raises:
          ValueError: there is nothing to resume, or it is another training or damaged, or another process writes there.
        """
        self._folder, self._about = folder, folder / "training.json"
        self._metrics = folder / "metrics.jsonl"
        changed = _check_same(self._about, about, set(may_change)) if resume else {}
        self._lock = FolderLock(folder)
        try:
            if not resume:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                shutil.rmtree(folder / "trained", ignore_errors=True)
            self._manager = _manager(folder / "checkpoints", keep)
            self.step = self._manager.latest_step() or 0 if resume else 0
            for name, was in changed.items():
                may_change[name](was, self.step)
            checkpoints = self._manager.all_steps() if self.step else []
            self.rows = _rows(self._metrics, self.step, checkpoints) if self.step else []
        except BaseException:
            self._lock.close()
            raise
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        with self._explained():
            _write_atomically(self._about, json.dumps(about, indent=1) + "\n")
            _write_atomically(self._metrics, text)
        self._file = open(self._metrics, "a", encoding="utf-8", buffering=1)

    def __enter__(self) -> TrainingFolder:
        return self

    def __exit__(self, *error) -> None:
        try:
            if error[0] is None:
                self.wait()
        finally:
            self._file.close()
            self._manager.close()
            self._lock.close()

    def log(self, row: dict[str, float]) -> None:
        """Adds a line of metrics."""
        with self._explained():
            self._file.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def save(self, step: int, state: Any, loss: float) -> None:
        """Starts to write a checkpoint; the state may be donated at once."""
        import orbax.checkpoint as ocp

        with self._explained():
            os.fsync(self._file.fileno())
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics={"loss": loss})

    def wait(self) -> None:
        """Until the last checkpoint is complete."""
        with self._explained():
            self._manager.wait_until_finished()

    def best_step(self) -> int:
        """The step whose checkpoint has the lowest loss."""
        self.wait()
        return self._manager.best_step()

    def load(self, step: int, like: Any) -> Any:
        """The state of a step.

        Args:
          step: of a checkpoint.
          like: a state of the same shapes.

        Raises:
          ValueError: the checkpoint is of other shapes, or damaged.
        """
        import orbax.checkpoint as ocp

        where = self._folder / "checkpoints" / str(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            held, wanted = _shapes(self._manager.item_metadata(step).tree), _shapes(abstract)
            for name in sorted({*held, *wanted}):
                if held.get(name) != wanted.get(name):
                    raise ValueError(
                        f"{name} is {held.get(name, 'missing')} there and {wanted.get(name, 'nothing')} here"
                    )
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # orbax raises what its storage raises
            raise ValueError(f"{where} cannot be resumed from: {_first_line(error)}.") from error

    def _explained(self):
        return _Explained(self)


class _Explained:
    """Says of a full disk what is kept and how to go on."""

    def __init__(self, folder: TrainingFolder):
        self._of = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        full = getattr(error, "errno", None) in _SPACE or "no space left" in str(error).lower()
        if error is not None and full:
            raise OSError(
                f"{self._of._folder}: no space left; the checkpoints that are complete are kept: make room and run the "
                "same command with --resume."
            ) from error


def _manager(folder: pathlib.Path, keep: int):
    import orbax.checkpoint as ocp  # slow to import, and few programs need it
    from orbax.checkpoint import checkpoint_managers

    logging.getLogger("absl").setLevel(logging.ERROR)  # a line of INFO for every step that keeps a checkpoint
    lowest = checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=keep)
    last = checkpoint_managers.LatestN(n=1)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy([last, lowest]),
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler())


def _check_same(path: pathlib.Path, about: dict[str, Any], may_change: set[str]) -> dict[str, Any]:
    """Returns what has changed of what may, as it was."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--resume: {path.parent} holds no training; leave --resume out to start one.") from None
    except (ValueError, RecursionError):
        raise ValueError(f"--resume: {path} is damaged; {_ANEW}") from None
    if not isinstance(earlier, dict):
        raise ValueError(f"--resume: {path} is damaged (it holds no settings); {_ANEW}")
    for name in sorted(may_change & set(earlier)):
        if type(earlier[name]) is not type(about[name]):
            raise ValueError(
                f"--resume: {path} is damaged ({name} is {reprlib.repr(earlier[name])}, not of the kind of "
                f"{about[name]!r}); {_ANEW}"
            )
    for name in sorted({*about, *earlier} - (may_change & set(earlier))):
        was, now = str(earlier.get(name)), str(about.get(name))
        if was != now:
            lines = difflib.unified_diff(was.splitlines(), now.splitlines(), lineterm="", n=0)
            changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
            raise ValueError(f"--resume: {path.parent} is of another {name}: {'; '.join(changed)}.")
    return {name: earlier[name] for name in sorted(may_change & set(earlier)) if earlier[name] != about[name]}


_ANEW = "pass another --output_dir, or --replace without --resume."


def _rows(path: pathlib.Path, step: int, checkpoints: Sequence[int]) -> list[dict[str, float]]:
    """The metrics up to a step; what was written after it may be cut off.

    Raises:
      ValueError: a line is damaged or missing that a finished training needs.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except UnicodeDecodeError:
        raise ValueError(f"--resume: {path} is damaged (it is not UTF-8); {_ANEW}") from None
    validated = {0, *checkpoints}
    for number in range(step + 1):
        where = f"--resume: {path}, line {number + 1}"
        if number >= len(lines):
            raise ValueError(f"{where} is missing: the last checkpoint is of step {step}; {_ANEW}")
        try:
            row = json.loads(lines[number])
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or row.get("step") != number or not all(map(_is_number, row.values())):
            raise ValueError(f"{where} is damaged: expected the metrics of step {number}; {_ANEW}")
        for name in (*(["loss"] if number else []), *(["validation"] if number in validated else [])):
            if name not in row:
                raise ValueError(f"{where} is damaged: step {number} has no {name}; {_ANEW}")
        rows.append(row)
    return rows


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _shapes(tree: Any) -> dict[str, str]:
    """What every leaf is, by its path without the kinds of its nodes: orbax stores tuples as it stores mappings."""
    name = lambda path: "/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves if hasattr(x, "shape")}


def _write_atomically(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
