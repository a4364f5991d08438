"""Methods by the name of their config file: what gin can reach, and how a file becomes a transform.

Everything of `kvjax.methods`, `kvjax.scores` and `kvjax.transforms` is a gin configurable under its own name
(scores under `scores.NAME`), so bindings such as `snapkv.window = 16` work on the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

import gin
import jax
import numpy as np

import kvjax
from experiments import bindings as gin_bindings
from experiments.results import setting
from experiments.suggestions import there_are
from models.tokenizer import Tokenizer

Calibrate = Callable[[str, str | None], Mapping[str, jax.Array]]
"""`(recipe, path) -> arrays`."""

READ = 0.125
"""Share of the context that a step of decoding may read, where nothing says so."""

METHODS_DIR = pathlib.Path(__file__).parent.parent / "configs" / "methods"

_SCORES = (
    "accumulated_attention",
    "accumulated_entropy",
    "blend",
    "call_attention",
    "crushed",
    "dispersion",
    "end_attention",
    "future_attention",
    "gumbel_attention",
    "in_blocks",
    "key_difference",
    "lag_relative",
    "last_query_attention",
    "leverage",
    "massive_activations",
    "negative_key_norm",
    "noncausal_attention",
    "output_perturbation",
    "over_heads",
    "random",
    "reconstruction",
    "recurrence",
    "redundancy",
    "retaining_heads",
    "strongest",
    "window_attention",
)
_TRANSFORMS = (
    "adaptive",
    "at_prefill_end",
    "balance_channels",
    "by_coverage",
    "by_variance",
    "cast",
    "convolve",
    "every",
    "every_chunk",
    "every_step",
    "evict",
    "evict_across_layers",
    "evict_by_head",
    "from_first_chunk",
    "identity",
    "into_nearest",
    "into_neighbour",
    "into_next",
    "into_runs",
    "into_similar",
    "learned",
    "merge",
    "merge_layers",
    "order_channels",
    "prefix",
    "product_quantize",
    "protect",
    "prune_channels",
    "pyramid",
    "quantize",
    "quantize_by_age",
    "quantize_corrected",
    "reindex",
    "ring",
    "select",
    "separate_values",
    "share_basis",
    "share_layers",
    "smooth_channels",
    "split_heads",
    "split_slots",
    "when_full",
    "whole_layers",
)

_INDICES = ("Bounds", "Exact", "MeanKey", "StrongChannels")

for _name in kvjax.methods.__all__:
    gin.external_configurable(getattr(kvjax.methods, _name), module="methods")
for _name in _SCORES:
    gin.external_configurable(getattr(kvjax.scores, _name), module="scores")
for _name in _TRANSFORMS:
    gin.external_configurable(getattr(kvjax, _name), module="transforms")
for _name in _INDICES:
    gin.external_configurable(getattr(kvjax.indices, _name), module="indices")


@gin.configurable(module="experiments")
def tokens(count: int = gin.REQUIRED) -> kvjax.Tokens:
    """A budget of so many tokens: `snapkv.budget = @tokens()` with `tokens.count = 1`, where a plain 1 is refused."""
    return kvjax.Tokens(count)


@dataclasses.dataclass(frozen=True)
class Method:
    """A transform with how its prompt is read.

    Attributes:
      name: of its config file.
      transform: what compresses.
      prefill_chunk: tokens of a chunk of the prompt; None reads it in one shot.
      config: the gin bindings that made it, and hashes of what it got of a model.
      budget: what `%budget` was in its config; None: the config does not use it.
      read: the same of `%read`.
    """

    name: str
    transform: kvjax.CacheTransform
    prefill_chunk: int | None
    config: str
    budget: int | float | None = None
    read: int | float | None = None

    @property
    def keep(self) -> float | None:
        """The fraction of the context that it was told to keep; None: none."""
        return self.budget if isinstance(self.budget, float) else None

    @property
    def budget_tokens(self) -> int | None:
        """The tokens per KV head that it was told to keep; None: none."""
        return self.budget if isinstance(self.budget, int) else None

    @property
    def setting(self) -> str:
        """Its name and what it was told to keep, and to read."""
        return setting(self.name, self.keep, self.budget_tokens, self.read)

    @property
    def reads_alone(self) -> bool:
        """Tells whether it must read a prompt by itself: in chunks, in chosen blocks, or with something before it."""
        schedule = self.transform.schedule
        own = schedule.before, schedule.needs.prompt_attention
        return self.prefill_chunk is not None or any(x is not None for x in own)


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
    found = _calibrations(recipe, path)
    digest = hashlib.sha256()
    for part in sorted(found):
        digest.update(part.encode() + np.asarray(found[part]).tobytes())
    _got.append(f"calibration {recipe}: {digest.hexdigest()[:16]}")
    return found


@gin.configurable(module="experiments")
def by_layer(arrays: Mapping[str, jax.Array] = gin.REQUIRED, names: Sequence[str] | None = None) -> list:
    """Splits arrays [L, ...], such as those of a `calibration`, into what each layer gets.

    Args:
      arrays: by name.
      names: the arrays of a layer come as a tuple in this order, as `prefix` and `product_quantize` take them; None: by
        name, as `learned` does.
    """
    if names is None:
        return [dict(zip(arrays, each)) for each in zip(*arrays.values())]
    unknown = [name for name in names if name not in arrays]
    if unknown:
        raise ValueError(f"by_layer.names: there is no {unknown[0]!r}; {there_are(unknown[0], sorted(arrays))}")
    return list(zip(*(arrays[name] for name in names)))


@gin.configurable(module="experiments")
def instruction_tokens(
    first: str = "\n\nRepeat the previous context exactly.",
    later: str = "\n\nRepeat the part of the previous context exactly, starting with",
) -> kvjax.Instruction:
    """Token ids that ask the model to repeat its context: as the end of the user's turn, before the model's reply.

    Args:
      first: asks for the beginning.
      later: asks for what follows the tokens that come after it.
    """
    if _tokenizer is None:
        raise ValueError("instruction_tokens needs a model's tokenizer, and there is none here.")
    mark = "[[context]]"
    answer = "\n"
    if _tokenizer.chat_template is not None:
        answer = _tokenizer.chat([{"role": "user", "content": mark}]).partition(mark)[2]
    tokens = [tuple(_tokenizer.encode(text)) for text in (first, later, answer)]
    _got.append(f"instruction tokens: {hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]}")
    return kvjax.Instruction(*tokens)


_calibrations: Calibrate | None = None  # of the `load_method` in progress
_tokenizer: Tokenizer | None = None  # the same
_got: list[str] = []  # what that method got of the model beside its bindings, as hashes


def method_names() -> list[str]:
    """Names of the files in configs/methods."""
    return sorted(path.stem for path in METHODS_DIR.glob("*.gin"))


def method_path(name: str) -> pathlib.Path | None:
    """Returns the path of a config file of one's own that a name is, or None where it is a name."""
    return pathlib.Path(name) if name.endswith(".gin") or "/" in name else None


def check_method_names(names: Sequence[str], flag: str = "--methods", *, paths: bool = False) -> None:
    """Refuses names without a config file.

    Args:
      names: of files in configs/methods.
      flag: that names them, for messages.
      paths: allow paths of other files, called like their stems, which no other method of these may be called.

    Raises:
      ValueError: a name is unknown, a path is no file or is called like another method.
    """
    given: dict[str, str] = {}
    for name in dict.fromkeys(names):
        path = method_path(name) if paths else None
        if path is None and name not in method_names():
            raise ValueError(f"{flag}: unknown method {name!r}; {there_are(name, method_names())}")
        if path is not None and not path.is_file():
            raise ValueError(f"{flag}: no such file: {name}.")
        called = name if path is None else path.stem
        if called in given or path is not None and called == "full":
            other = given.get(called, "full")
            raise ValueError(f"{flag}: {other} and {name} are both called {called}: rename the file.")
        given[called] = name


def config_text(name: str) -> str:
    """Returns what stands in the config file of a method.

    Raises:
      ValueError: it is not UTF-8.
      OSError: it cannot be read.
    """
    path = method_path(name) or METHODS_DIR / f"{name}.gin"
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"method {name}: {path}: got bytes that are not UTF-8 ({error.reason}).") from None


def load_method(
    name: str,
    *,
    budget: kvjax.Budget,
    read: kvjax.Budget = READ,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    calibrate: Calibrate | None = None,
    tokenizer: Tokenizer | None = None,
    text: str | None = None,
) -> Method:
    """Builds the method that `configs/methods/NAME.gin` describes, or a file of one's own.

    Args:
      name: of the file, or the path of another one.
      budget: what `%budget` means in it: tokens per KV head (int) or a fraction of the context (float).
      read: the same for `%read`, which a step of decoding may read.
      gin_files: read after the method's file, so they win over it.
      bindings: read after all files, so they win.
      calibrate: gives what `calibration()` in a config stands for; `experiments.calibrations.Calibrations`.
      tokenizer: of the model, for `instruction_tokens()` in a config.
      text: what stands in the file, where there is none of that name.

    Raises:
      ValueError: an unknown name, a binding that reaches nothing, or settings that the method refuses.
    """
    if text is None:
        check_method_names([name], paths=True)
        text = config_text(name)
        name = pathlib.Path(name).stem if method_path(name) else name
    macros = {"budget": budget, "read": read}
    gin.clear_config()
    with gin.unlock_config():
        gin_bindings.parse(text, f"method {name}, its config")
        gin_bindings.read_files(gin_files)
        for macro, value in macros.items():
            one = isinstance(value, int) and value == 1
            gin.parse_config(f"tokens.count = 1\n{macro} = @tokens()" if one else f"{macro} = {value}")
        gin_bindings.parse_each(bindings)
    global _calibrations, _tokenizer
    _calibrations, _tokenizer = calibrate, tokenizer
    _got.clear()
    try:
        gin_bindings.check_values()
        transform, chunk = method()
    except RecursionError as error:
        raise ValueError(f"method {name}: its bindings refer to themselves.") from error
    except (ValueError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise ValueError(f"method {name}: {gin_bindings.explained(error)}") from error
    finally:
        _calibrations = _tokenizer = None
    if not isinstance(transform, kvjax.CacheTransform):
        got = f"@{transform.__name__}" if callable(transform) else repr(transform)
        raise ValueError(f"method {name}: method.transform must be a call such as @snapkv(), got {got}.")
    config = gin.operative_config_str() + "".join(f"# {line}\n" for line in _got)
    used = [value if gin_bindings.binds_macro(config, macro) else None for macro, value in macros.items()]
    return Method(name, transform, chunk, config, *used)
