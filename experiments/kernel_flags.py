"""The flags of the programs that run kernels, and how these programs report."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
import secrets
from collections.abc import Sequence

import jax
from absl import flags

from experiments import cli
from experiments.kernel_cases import CASES, KernelCase
from experiments.suggestions import there_are
from experiments.tpu_compiler import GENERATIONS, Generation

COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile for TPUs instead of running; needs no accelerator.")
KERNELS = flags.DEFINE_list("kernels", None, f"Of {', '.join(case.name for case in CASES)}; all without it.")
SEED = flags.DEFINE_integer("seed", None, "Of the inputs; without it, another one in every run.")
_GENERATIONS = flags.DEFINE_list("generations", [g.name for g in GENERATIONS], "Of TPUs, for --compile_only.")

_PACKAGES = ("jax", "jaxlib", "libtpu", "torch")


def cases() -> list[KernelCase]:
    """What --kernels names."""
    return _chosen(KERNELS, CASES)


def generations() -> list[Generation]:
    """What --generations names."""
    return _chosen(_GENERATIONS, GENERATIONS)


def seed() -> int:
    """What --seed says, or a random one."""
    return secrets.randbits(31) if SEED.value is None else SEED.value


def _chosen(flag: flags.FlagHolder, known: Sequence) -> list:
    """The entries of a flag's names, in the order of `known`."""
    names = [entry.name for entry in known] if flag.value is None else flag.value
    for name in names:
        if name not in [entry.name for entry in known]:
            raise ValueError(f"--{flag.name}: unknown name {name!r}; {there_are(name, [e.name for e in known])}")
    if not names:
        raise ValueError(f"--{flag.name} must name at least one of {', '.join(entry.name for entry in known)}.")
    return [entry for entry in known if entry.name in names]


def about() -> dict:
    """When, and with which versions."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {"date": now, "versions": found}


def versions_line() -> str:
    """The versions of `about` in a line."""
    return ", ".join(f"{name} {version}" for name, version in about()["versions"].items())


def folder(path) -> pathlib.Path:
    """Made before anything takes time."""
    made = pathlib.Path(path)
    made.mkdir(parents=True, exist_ok=True)
    return made


def say(text: str) -> None:
    """A part of the table."""
    if not cli.JSON.value:
        print(text, flush=True)


def deliver(report: dict, path: pathlib.Path | None) -> None:
    """Prints the report if --json asks, and writes it if there is a path."""
    if cli.JSON.value:
        print(_document(report))
    if path:
        write(report, path)
        say(f"\nWrote {path}.")


def write(report: dict, path: pathlib.Path) -> None:
    """The report as a file."""
    path.write_text(_document(report) + "\n", encoding="utf-8")


def _document(report: dict) -> str:
    return json.dumps(about() | report, indent=1)


def implementation(device: jax.Device) -> str:
    """The kernels of a device.

    Raises:
      ValueError: there are none.
    """
    name = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(device.platform)
    if name is None:
        found = f"found {device.platform} only; --compile_only needs neither"
        raise ValueError(f"running kernels needs a GPU or a TPU, {found}.")
    if name == "mosaic_gpu" and device.compute_capability != "9.0":
        found = f"found {device.device_kind} of {device.compute_capability}"
        raise ValueError(f"the GPU kernels are for Hopper, compute capability 9.0, {found}.")
    return name
