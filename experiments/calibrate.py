"""Measures on a model what an offline method needs, and saves it.

    python -m experiments.calibrate --method=matryoshka_pca --model=smollm2 --output_dir=out/pca

The folder is named in the method's config, `calibration.path = 'out/pca'`. Text comes from essays that the evaluation
does not hold back. Seconds to minutes on 2 cores for SmolLM2; with `--mesh=model:8` on several devices.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import pathlib
import time

from absl import flags

from experiments import calibrations, cli, measurements
from experiments.loading import on_mesh
from experiments.output_folder import output_folder
from experiments.report import human_bytes
from experiments.suggestions import there_are
from kvjax import nbytes
from models import Model

_METHOD = flags.DEFINE_string("method", None, f"One of {', '.join(measurements.RECIPES)}.")
_TEXTS = flags.DEFINE_integer("texts", measurements.Settings.texts, "Sequences to read.")
_TOKENS = flags.DEFINE_integer("tokens", measurements.Settings.tokens, "Tokens of a sequence.")
for _name in ("model", "dtype", "mesh", "output_dir", "replace"):
    flags.declare_key_flag(_name)


def run() -> None:
    """The program."""
    if _METHOD.value is None:
        raise ValueError(f"--method is required: one of {', '.join(measurements.RECIPES)}.")
    if _METHOD.value not in measurements.RECIPES:
        known = there_are(_METHOD.value, measurements.RECIPES)
        raise ValueError(f"--method: nothing to calibrate for {_METHOD.value!r}; {known}")
    with on_mesh(cli.MESH.value) as load:
        folder = output_folder("calibration")
        _measure(load(cli.MODEL.value or "smollm2", cli.DTYPE.value or "float32"), folder)


def _measure(model: Model, folder: pathlib.Path) -> None:
    settings = measurements.Settings(texts=_TEXTS.value, tokens=_TOKENS.value)
    started = time.perf_counter()
    data = measurements.measure(_METHOD.value, model, settings)
    calibrations.save(folder, _METHOD.value, model, data, settings)
    print(
        f"{_METHOD.value} of {model.config.name}, {settings.texts} texts of {settings.tokens} tokens, "
        f"{time.perf_counter() - started:.0f} s: {human_bytes(nbytes(dict(data)))} in {folder}"
    )
    for name, x in data.items():
        print(f"  {name:<14} {x.dtype}{list(x.shape)}")


if __name__ == "__main__":
    cli.start(run)
