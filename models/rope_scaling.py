"""Rotary frequencies for contexts longer than a model was first trained on: what config files call rope scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


class Scaling(NamedTuple):
    """Fields of `DecoderConfig` that a rope scaling decides."""

    rope_divisors: tuple[float, ...] = ()
    rope_gain: float = 1.0
    max_positions: int | None = None  # where it decides the context


def read_scaling(
    rope: Mapping[str, Any], *, base: float, channels: int, trained: int, longest: int, context: int | None
) -> Scaling:
    """What a config's scaling means for each rotary pair i, with frequency `f = base ** (-2 i / R)`.

    linear: `f / factor`.
    llama3: `f / factor` for wavelengths `2 pi / f` above `trained / low_freq_factor`, `f` below
      `trained / high_freq_factor`, and in between interpolated by how many wavelengths `trained` tokens are.
    yarn: `f` for pairs that turn more than `beta_fast` times in `trained` tokens, `f / factor` for those that turn
      less than `beta_slow` times, a ramp over the pairs between; the gain is `0.1 log(factor) + 1`.
    linear and yarn lengthen a context of `trained` tokens to `factor` times as many, llama3 to what the file says.
    longrope: `f / short_factor[i]`, or `f / long_factor[i]` where the context is to be longer than `trained`; the gain
      is `sqrt(1 + log(longest / trained) / log(trained))`.

    Args:
      rope: the fields of rope_scaling or rope_parameters.
      base: theta.
      channels: [R], rotated channels of a head.
      trained: tokens of the context before it was stretched, where `rope` does not say it.
      longest: tokens of the whole context.
      context: tokens the caller needs; longrope only, whose frequencies depend on them.

    Raises:
      ValueError: another kind, a field missing, or one of the wrong size.

    Source: Chen et al., Position Interpolation (2023); Grattafiori et al., Llama 3 (2024); Peng et al., YaRN (2023);
    Ding et al., LongRoPE (2024).
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "su":  # the first name of longrope
        kind = "longrope"
    if kind == "default":
        return Scaling()
    if kind not in KINDS:
        raise ValueError(f"rope_type is {kind!r}, supported: {', '.join(KINDS)}.")
    if base == 1.0:
        raise ValueError(f"rope scaling {kind!r} needs frequencies that differ; rope_theta is 1.")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        none_given = rope.get(name) is None or (name != "attention_factor" and rope[name] == 0)  # a scale of 0 is none
        if not none_given:
            positive(f"{name} of rope scaling {kind!r}", rope[name])

    def number(name: str, default: float | None = None) -> float:
        value = rope.get(name, default)
        if not _is_positive(value):
            raise ValueError(f"rope scaling {kind!r} needs {name}, a positive number; got {value!r}.")
        return float(value)

    trained = int(number("original_max_position_embeddings", trained))
    pairs = np.arange(channels // 2)
    frequency = base ** (-2.0 * pairs / channels)
    if kind == "linear":
        factor = number("factor")
        return Scaling((factor,) * len(pairs), max_positions=int(trained * factor))
    if kind == "llama3":
        factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
        if low == high:
            raise ValueError(f"rope scaling 'llama3' needs low_freq_factor unlike high_freq_factor; both are {low}.")
        turns = trained * frequency / (2 * math.pi)  # wavelengths in the context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return Scaling(tuple(1.0 / (smooth + (1.0 - smooth) / factor)))
    if kind == "yarn":
        factor = number("factor")
        pair_of = lambda turns: channels * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))
        first, last = pair_of(number("beta_fast", 32.0)), pair_of(number("beta_slow", 1.0))
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, channels - 1)
        ramp = np.clip((pairs - first) / max(last - first, 0.001), 0.0, 1.0)
        divisors = tuple(1.0 / (ramp / factor + 1.0 - ramp))
        return Scaling(divisors, _yarn_gain(rope, factor), int(trained * factor))
    stretch = longest / trained
    if stretch > 1 and trained < 2:
        raise ValueError(f"original_max_position_embeddings is {trained}, expected at least 2 for 'longrope'.")
    gain = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    beyond = context is not None and context > trained
    divisors = rope.get("long_factor" if beyond else "short_factor")
    if not isinstance(divisors, (list, tuple)) or len(divisors) != len(pairs):
        raise ValueError(f"rope scaling 'longrope' needs {len(pairs)} numbers in short_factor and in long_factor.")
    if not all(map(_is_positive, divisors)):
        raise ValueError("rope scaling 'longrope' needs positive numbers in short_factor and in long_factor.")
    gain = float(rope.get("attention_factor") or gain)
    return Scaling(tuple(map(float, divisors)), gain, longest if beyond else trained)


def positive(name: str, value: Any) -> float:
    """Returns a finite number above 0.

    Raises:
      ValueError: it is none; the message names it.
    """
    if not _is_positive(value):
        raise ValueError(f"{name} is {value!r}, expected a positive number.")
    return float(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def logit_gain(rope: Mapping[str, Any]) -> float:
    """What models with `mscale_all_dim` multiply both queries and keys by, all of their channels."""
    scale, factor = rope.get("mscale_all_dim"), rope.get("factor")
    return yarn_gain(factor, scale) if scale and factor else 1.0


def _yarn_gain(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_gain(factor, rope["mscale"]) / yarn_gain(factor, rope["mscale_all_dim"])
    return yarn_gain(factor)


def yarn_gain(factor: float, scale: float = 1.0) -> float:
    """`0.1 scale log(factor) + 1`: queries and keys are multiplied by it where a context was stretched."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
