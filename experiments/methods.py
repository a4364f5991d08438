"""Methods by the name of their config file: what gin can reach, and how a file becomes a transform.

Everything of `kvjax.methods`, `kvjax.scores` and `kvjax.transforms` is a gin configurable under its own name
(scores under `scores.NAME`), so bindings such as `snapkv.window = 16` work on the command line.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import gin
import jax

import kvjax

Calibrate = Callable[[str, str | None], Mapping[str, jax.Array]]
"""`(recipe, path) -> arrays`."""

METHODS_DIR = pathlib.Path(__file__).parent.parent / "configs" / "methods"

_SCORES = (
    "accumulated_attention",
    "future_attention",
    "key_difference",
    "last_query_attention",
    "negative_key_norm",
    "random",
    "recurrence",
    "window_attention",
)
_TRANSFORMS = (
    "adaptive",
    "at_prefill_end",
    "cast",
    "every",
    "every_chunk",
    "every_step",
    "evict",
    "evict_by_head",
    "identity",
    "merge_layers",
    "prune_channels",
    "pyramid",
    "quantize",
    "ring",
    "share_basis",
    "split_heads",
    "when_full",
)

for _name in kvjax.methods.__all__:
    gin.external_configurable(getattr(kvjax.methods, _name), module="methods")
for _name in _SCORES:
    gin.external_configurable(getattr(kvjax.scores, _name), module="scores")
for _name in _TRANSFORMS:
    gin.external_configurable(getattr(kvjax, _name), module="transforms")


@dataclasses.dataclass(frozen=True)
class Method:
    """A transform with how its prompt is read.

    Attributes:
      name: of its config file.
      transform: what compresses.
      prefill_chunk: tokens of a chunk of the prompt; None reads it in one shot.
      config: the gin bindings that made it.
    """

    name: str
    transform: kvjax.CacheTransform
    prefill_chunk: int | None
    config: str


@gin.configurable(module="experiments")
def method(transform: kvjax.CacheTransform = gin.REQUIRED, prefill_chunk: int | None = None):
    """What a file in configs/methods binds: the transform, and the chunk of its prefill."""
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be at least 1 token or None, got {prefill_chunk}.")
    return transform, prefill_chunk


@gin.configurable(module="experiments")
def compose(transforms: Sequence[kvjax.CacheTransform] = gin.REQUIRED) -> kvjax.CacheTransform:
    """`kvjax.chain` over a list, which gin can bind."""
    return kvjax.chain(*transforms)


@gin.configurable(module="experiments")
def calibration(recipe: str = gin.REQUIRED, path: str | None = None) -> Mapping[str, jax.Array]:
    """What a method measured on the model: from a folder of `experiments.calibrate`, or by itself for None."""
    if _calibrations is None:
        raise ValueError(f"{recipe} needs a model to be calibrated on, and there is none here.")
    return _calibrations(recipe, path)


_calibrations: Calibrate | None = None  # of the `load_method` in progress


def method_names() -> list[str]:
    """Names of the files in configs/methods."""
    return sorted(path.stem for path in METHODS_DIR.glob("*.gin"))


def check_method_names(names: Sequence[str]) -> None:
    """Refuses names without a config file."""
    for name in names:
        if name not in method_names():
            raise ValueError(f"--methods: unknown method {name!r}; there are {', '.join(method_names())}.")


def load_method(
    name: str,
    *,
    budget: int | float,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    calibrate: Calibrate | None = None,
) -> Method:
    """Builds the method that `configs/methods/NAME.gin` describes.

    Args:
      name: of the file.
      budget: what `%budget` means in it: tokens per KV head (int) or a fraction of the context (float).
      gin_files: read before the method's file.
      bindings: read after it, so they win.
      calibrate: gives what `calibration()` in a config stands for; `experiments.calibrations.Calibrations`.

    Raises:
      ValueError: an unknown name, a binding that reaches nothing, or settings that the method refuses.
    """
    check_method_names([name])
    gin.clear_config()
    with gin.unlock_config():
        for path in gin_files:
            gin.parse_config_file(path)
        gin.parse_config(f"budget = {budget!r}")
        gin.parse_config_file(str(METHODS_DIR / f"{name}.gin"))
        gin.parse_config(bindings)
    global _calibrations
    _calibrations = calibrate
    try:
        transform, chunk = method()
    except (ValueError, TypeError) as error:
        raise ValueError(f"method {name}: {_first_lines(error)}") from error
    finally:
        _calibrations = None
    return Method(name, transform, chunk, gin.operative_config_str())


def _first_lines(error: Exception) -> str:
    """The message without the trail that gin appends to it."""
    return str(error).split("\n  In call to configurable")[0].strip()
