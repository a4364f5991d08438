"""How much of its arguments a kernel takes at a time: what was measured on the device, else what a heuristic says.

`python -m experiments.tune_kernels` measures, and writes tuned/DEVICE.json beside this file. A kernel asks while it is
traced, so the device is the one that a program is traced for: that of the mesh in use, which may be one to compile for
only, else JAX's default device; `use(read(kind))` says another. An entry holds for every batch and every number of
slots: its key is all else that decides what fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FOLDER = pathlib.Path(__file__).parent / "tuned"

Sizes = dict[str, int]
"""What a kernel leaves open, by name, such as {"slots": 1024, "splits": 2}."""


class Choice(NamedTuple):
    """What a kernel leaves open at some shapes."""

    kernel: str  # "decode_attention.mosaic_tpu"
    key: str  # of an entry: shapes and dtypes without batch and slots
    default: Sizes  # what the heuristic says
    candidates: Sequence[Sizes]  # that a table may say instead, the same for every batch and number of slots
    fit: Callable[[Sizes], Hashable]  # what becomes of sizes at these shapes; the same for some of the candidates


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Sizes for one device.

    Attributes:
      sizes: by kernel and key.
      source: the file, for errors.
      kind: of the device whose sizes these are; None: that which a program is traced for.
      asked: takes down the choices of the kernels that are traced, where it is a list.
    """

    sizes: dict[tuple[str, str], Sizes] = dataclasses.field(default_factory=dict)
    source: str = "a table"
    kind: str | None = None
    asked: list[Choice] | None = None


_in_use = jax.make_user_context(None)  # jit keeps what it traced with each table apart


def key(**parts: Any) -> str:
    """The key of an entry: names and what they stand for, dtypes by their names."""
    text = lambda x: str(x) if isinstance(x, (int, str)) else jnp.dtype(x).name
    return " ".join(f"{name}={text(value)}" for name, value in parts.items())


def choose(
    kernel: str, key: str, *, default: Sizes, candidates: Sequence[Sizes], fit: Callable[[Sizes], Hashable]
) -> Any:
    """`fit` of the sizes that the table in use has for a kernel and key, or of the default.

    Args:
      kernel, key, default, candidates, fit: see `Choice`.

    Raises:
      ValueError: the table has sizes that are none of the candidates, with its file and the key.
    """
    table = read(device_kind()) if _in_use.value is None else _in_use.value
    if table.asked is not None:
        table.asked.append(Choice(kernel, key, default, candidates, fit))
    sizes = table.sizes.get((kernel, key))
    if sizes is not None and sizes not in candidates:
        names = ", ".join(default)
        raise ValueError(
            f"{table.source}: {kernel}, {key!r}: {sizes} is none of the sizes ({names}) that this kernel takes; "
            "experiments.tune_kernels finds them again."
        )
    return fit(default if sizes is None else sizes)


@contextlib.contextmanager
def use(table: Table) -> Iterator[None]:
    """Kernels that are traced inside take their sizes from a table, whatever the device."""
    with _in_use(table):
        yield


def device_kind() -> str:
    """What the device calls itself that programs are traced for here, such as "TPU v5 lite"."""
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    if of_mesh is not None:
        return of_mesh.device_kind
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default.device_kind
    return jax.devices(default)[0].device_kind


def kind_in_use() -> str:
    """The kind of the table in use, or of the device that programs are traced for here."""
    table = _in_use.value
    return device_kind() if table is None or table.kind is None else table.kind


def path_of(kind: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    """The file of a device, in `FOLDER` or another."""
    return (folder or FOLDER) / f"{file_name(kind)}.json"


def file_name(kind: str) -> str:
    """A device's name as that of a file: "TPU v5 lite" is "tpu_v5_lite"."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def read(kind: str) -> Table:
    """The table of a device; an empty one if nothing was measured on it."""
    path = path_of(kind)
    return _read(path, kind) if path.is_file() else _nothing(kind)


@functools.cache
def _nothing(kind: str) -> Table:
    return Table(kind=kind)


@functools.cache
def _read(path: pathlib.Path, kind: str) -> Table:
    return dataclasses.replace(parse(path.read_text("utf-8"), str(path)), kind=kind)


def parse(text: str, source: str) -> Table:
    """A table from JSON: under "block_sizes", by kernel and key, entries with "sizes", null where the default is best.

    Raises:
      ValueError: it is not one, naming `source` and what of it.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error}.") from error
    sizes = {}
    for kernel, entries in _object(_object(document, source).get("block_sizes"), f"{source}: block_sizes").items():
        for name, entry in _object(entries, f"{source}: {kernel}").items():
            where = f"{source}: {kernel}, {name!r}"
            if "sizes" not in _object(entry, where):
                raise ValueError(f"{where}: no sizes.")
            if entry["sizes"] is None:
                continue
            values = _object(entry["sizes"], f"{where}: sizes")
            wrong = [f"{n}={value!r}" for n, value in values.items() if type(value) is not int or value < 1]
            if wrong or not values:
                got = ", ".join(wrong) or "none"
                raise ValueError(f"{where}: sizes must be whole numbers of at least 1, got {got}.")
            sizes[kernel, name] = values
    return Table(sizes, source)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object, got {json.dumps(value)[:40]}.")
    return value


def doublings(least: int, most: int) -> tuple[int, ...]:
    """`least`, twice as many, and so on up to `most`; `least` in any case."""
    found = [least]
    while 2 * found[-1] <= most:
        found.append(2 * found[-1])
    return tuple(found)
