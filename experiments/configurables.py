"""Lists what gin files and --gin_bindings can bind: names, parameters, their types and defaults.

    python -m experiments.configurables                        # everything
    python -m experiments.configurables snapkv Settings        # these
    python -m experiments.configurables --methods=snapkv_int4  # what that method's file binds, with its values

A line such as `snapkv.window: int = 32` is bound by `--gin_bindings='snapkv.window = 16'`. A `Budget` is a whole number
of tokens per KV head, or a fraction of the prompt with a point in it.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any

import gin
from absl import flags

from experiments import bindings, cli, evaluation, train  # noqa: F401, the last two are bound, too
from experiments.methods import check_method_names, config_text
from experiments.suggestions import nearest

for _name in ("methods", "json"):
    flags.declare_key_flag(_name)

_REQUIRED = "required"


def configurables() -> dict[str, dict[str, Any]]:
    """Describes every configurable, by the shortest name that gin knows it by.

    Returns:
      `{name: {"doc": first sentence, "parameters": {name: {"type": text, "default": text}}}}`, sorted; a parameter that
      must be bound has the default "required".
    """
    registry = gin.config._REGISTRY  # gin lists them nowhere else
    found = {}
    for selector, entry in registry.items():
        if selector.startswith("gin."):
            continue
        wrapped = entry.wrapped
        found[registry.minimal_selector(selector)] = {
            "doc": (inspect.getdoc(wrapped) or "").strip().split("\n")[0],
            "parameters": _parameters(wrapped),
        }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _parameters(wrapped: Any) -> dict[str, dict[str, str]]:
    fields = {field.name: field for field in dataclasses.fields(wrapped)} if dataclasses.is_dataclass(wrapped) else {}
    described = {}
    for name, parameter in inspect.signature(wrapped).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = "" if parameter.annotation is parameter.empty else parameter.annotation
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        default = parameter.default
        if name in fields and fields[name].default_factory is not dataclasses.MISSING:
            default = fields[name].default_factory()
        needed = default is parameter.empty or default is gin.REQUIRED
        shown = _REQUIRED if needed else getattr(default, "__name__", None) or repr(default)
        described[name] = {"type": kind, "default": shown}
    return described


def bound_by(method: str) -> dict[str, dict[str, str]]:
    """Returns what a method's file binds: `{name: {parameter: value}}`."""
    gin.clear_config()
    with gin.unlock_config():
        bindings.parse(config_text(method), f"method {method}, its config")
    bound: dict[str, dict[str, str]] = {}
    for line in gin.config_str(max_line_length=10**6).splitlines():
        name, mark, value = line.partition(" = ")
        if mark and "." in name and not line.startswith("#"):
            owner, _, parameter = name.rpartition(".")
            bound.setdefault(owner, {})[parameter] = value
    gin.clear_config()
    return bound


def lines(described: Mapping[str, Mapping[str, Any]], bound: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Writes each configurable with its parameters below it; values that a file binds stand in place of defaults."""
    text = []
    for name, entry in described.items():
        text.append(f"{name}  # {entry['doc']}" if entry["doc"] else name)
        for parameter, of in entry["parameters"].items():
            kind = f": {of['type']}" if of["type"] else ""
            value = bound.get(name, {}).get(parameter, of["default"])
            text.append(f"  {name}.{parameter}{kind}" + ("" if value == _REQUIRED else f" = {value}"))
    return text


def run(*names: str) -> None:
    """The program; `names` are those to list, all without them."""
    described, bound = configurables(), {}
    for method in cli.METHODS.value or ():
        check_method_names([method], paths=True)
        for owner, values in bound_by(method).items():
            bound.setdefault(owner, {}).update(values)
    for name in names:
        if name not in described:
            close = nearest(name, described)
            raise ValueError(f"nothing is called {name!r}{'.' if close is None else f'; did you mean {close!r}?'}")
    wanted = dict.fromkeys([*names, *bound]) if names or cli.METHODS.value else described
    unscoped = {name: name.rpartition("/")[2] for name in wanted}
    chosen = {name: described[plain] for name, plain in unscoped.items() if plain in described}
    if cli.JSON.value:
        print(json.dumps({"configurables": chosen, "bound": bound}, indent=2))
    else:
        print("\n".join(lines(chosen, bound)))


if __name__ == "__main__":
    cli.start(run)
