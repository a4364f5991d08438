"""Reads gin files and bindings, and checks that their values fit and that they reach anything."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import reprlib
import sys
import tokenize
from collections.abc import Iterable, Sequence
from typing import Any

import gin

from experiments.suggestions import nearest

# The headers of gin's own rendering of a configuration, and the macros in it.
_CONFIGURABLE = re.compile(r"^# Parameters for (\S+):$", re.MULTILINE)
_MACRO = re.compile(r"^([\w/]+) = ", re.MULTILINE)
_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))  # what is neither a reference nor a macro

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "Budget": "a number",
    "bool": "True or False",
    "str": "a string",
    "None": "None",
    "Sequence[str]": "a list of strings",
    "Sequence[int]": "a list of whole numbers",
    "Sequence[float]": "a list of numbers",
}


def read_files(paths: Iterable[str]) -> None:
    """Adds files to gin's configuration; a byte order mark at their start is no part of them.

    Raises:
      ValueError: bytes that are not UTF-8, text that gin cannot parse, or names that it does not know.
      OSError: a file cannot be read.
    """
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"--gin_file: {path}: got bytes that are not UTF-8 ({error.reason}).") from None
        parse(text, path)


def parse(text: str, where: str) -> None:
    """Adds bindings to gin's configuration.

    Args:
      text: the bindings.
      where: they stand, for messages.

    Raises:
      ValueError: gin cannot parse them, does not know a name, or cannot find what they import or include.
    """
    at = lambda line: f"{where}, line {line}" if "\n" in text.strip() and line else where
    try:
        gin.parse_config(text)
    except SyntaxError as error:
        raise ValueError(f"{at(error.lineno)}: {_plain(error.msg)}") from None
    except tokenize.TokenError as error:
        raise ValueError(f"{where}: a bracket or a string is not closed ({error.args[0]}).") from None
    except RecursionError:
        raise ValueError(f"{where}: includes itself, or holds brackets nested too deeply.") from None
    except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
        message, _, trail = str(error).partition("\n  In ")
        line = re.match(r"bindings string line (\d+)", trail)
        raise ValueError(f"{at(line and line[1])}: {_plain(message)}{_meant(message)}") from None


def parse_each(bindings: Sequence[str]) -> None:
    """Adds the bindings of --gin_bindings; see `parse`."""
    for binding in bindings:
        parse(binding, f"--gin_bindings: {reprlib.repr(binding)}")


def explained(error: Exception) -> str:
    """Returns what went wrong in a call of a configurable, without the trail that gin appends."""
    text = str(error)
    macro = re.search(r"configurable 'macro' .*in scope '([^']+)'", text)
    if macro and text.startswith("macro() missing"):
        return f"%{macro[1]} is used, and nothing binds {macro[1]}."
    return text.split("\n  In call to configurable")[0].strip()


def _plain(message: str) -> str:
    """gin's message on one line, without the addresses of what it parsed."""
    message = re.sub(r" on line \d+: <ast\.\w+ object at 0x[0-9a-f]+>", "", message)
    message = re.sub(r" \(<unknown>, line \d+\)", "", message).replace("malformed node or string", "not a value")
    lines = [line.strip() if len(line) < 200 else f"{line.strip()[:200]}..." for line in message.splitlines()]
    return "; ".join(line for line in lines if line)


def _meant(message: str) -> str:
    """The known name that was probably meant where gin says that it knows none; empty where there is none."""
    parameter = re.match(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", message)
    name = re.match(r"No configurable matching (?:reference )?'@?(?:[\w./]*/)?((?:\w+\.)*)(\w+)", message)
    if parameter:
        close = nearest(parameter[2], inspect.signature(gin.get_configurable(parameter[1])).parameters)
    elif name:
        registered = (selector for selector, _ in gin.config._REGISTRY.items())  # gin lists them nowhere else
        close = nearest(name[2], sorted({selector.rpartition(".")[2] for selector in registered}))
        close = None if close is None else name[1] + close
    else:
        return ""
    return "" if close is None else f" Did you mean {close!r}?"


def check_values() -> None:
    """Refuses values of the wrong kind, by the name that they are bound to.

    Only plain values are checked, and only for parameters whose annotation is made of numbers, strings and None.

    Raises:
      ValueError: for the first such binding.
    """
    for name in _CONFIGURABLE.findall(gin.config_str()):
        scope, _, selector = name.rpartition("/")
        parameters = inspect.signature(gin.get_configurable(selector)).parameters
        with gin.config_scope(scope or None):
            bound = gin.get_bindings(selector, resolve_references=False)
        for parameter, value in bound.items():
            bits = 64 if parameter == "seed" else 32  # what is counted is an i32 on the device
            if isinstance(value, int) and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
                raise ValueError(f"{name}.{parameter} must fit into {bits} bits, got {reprlib.repr(value)}.")
            if parameter in parameters and isinstance(value, _PLAIN):
                wanted = _expected(value, str(parameters[parameter].annotation))
                if wanted is not None:
                    raise ValueError(f"{name}.{parameter} must be {wanted}, got {value!r}.")


def _expected(value: Any, annotation: str) -> str | None:
    """Returns what an annotation asks for where the value is something else; None where it fits or nothing is known."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if not set(kinds) <= set(_WORDS):
        return None
    number = lambda item: isinstance(item, (int, float)) and not isinstance(item, bool)
    whole = lambda item: number(item) and isinstance(item, int)
    listed = lambda fits: isinstance(value, (list, tuple)) and all(map(fits, value))
    fits = {
        "int": whole(value),
        "float": number(value),
        "Budget": number(value),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "None": value is None,
        "Sequence[str]": listed(lambda item: isinstance(item, str)),
        "Sequence[int]": listed(whole),
        "Sequence[float]": listed(number),
    }
    if any(fits[kind] for kind in kinds):
        return None
    return " or ".join(_WORDS[kind] for kind in kinds if kind != "int" or "float" not in kinds)


def check_reached(files: Sequence[str], bindings: Sequence[str], configs: Iterable[str]) -> None:
    """Refuses bindings that nothing used, and says which lines of files nothing used.

    A file may serve several runs, so what it holds beyond this one is only said.

    Args:
      files: read from --gin_file.
      bindings: of --gin_bindings.
      configs: what gin renders as operative, of everything that was built from them.

    Raises:
      ValueError: a binding of a method that does not run, or a macro that nothing names.
    """
    called = {name for config in configs for name in _names(config)}
    # A call in the scope a/b sees what is bound for a/b, for a, and without a scope.
    used = called | {
        "/".join([*scopes[:count], name])
        for *scopes, name in (name.split("/") for name in called)
        for count in range(len(scopes))
    }
    for path in files:
        idle = sorted(_names_of(lambda: read_files([path])) - used)
        if idle:
            print(f"note: {path}: nothing here uses {', '.join(idle)}.", file=sys.stderr)
    for binding in bindings:
        idle = sorted(_names_of(lambda: parse_each([binding])) - used)
        if idle:
            raise ValueError(f"--gin_bindings: nothing here uses {', '.join(idle)}, got {binding!r}.")


def check_own(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Refuses what would replace every method by one, or the budget behind the flags' back.

    Raises:
      ValueError: `method.transform` or the macro `budget` is bound.
    """
    for flag, source, read in (
        *(("--gin_file", path, lambda path=path: read_files([path])) for path in files),
        *(("--gin_bindings", repr(text), lambda text=text: parse_each([text])) for text in bindings),
    ):
        text = _config_of(read)
        if re.search(r"^method\.transform = ", text, re.MULTILINE):
            raise ValueError(f"{flag}: {source} binds method.transform, which is a method's own: name it in --methods.")
        for macro, by in (("budget", "--keep or --budget"), ("read", "--read")):
            if macro in _names(text):
                raise ValueError(f"{flag}: {source} binds the macro {macro}, which {by} sets.")


def origin(value: str, files: Sequence[str], bindings: Sequence[str]) -> str | None:
    """The binding whose string is `value`, such as `Settings.tasks`; None: there is none."""
    texts = [*bindings]
    for path in files:
        try:
            texts.append(pathlib.Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError):
            continue
    for line in "\n".join(texts).splitlines():
        name, _, literal = line.partition("=")
        try:
            if ast.literal_eval(literal.strip()) == value:
                return name.strip()
        except (ValueError, SyntaxError):
            continue
    return None


def binds_macro(config: str, name: str) -> bool:
    """Returns whether a rendered configuration holds a macro."""
    return name in _MACRO.findall(config)


def _names(config: str) -> set[str]:
    return {*_CONFIGURABLE.findall(config), *_MACRO.findall(config)}


def _names_of(read) -> set[str]:
    return _names(_config_of(read))


def _config_of(read) -> str:
    """How gin renders what `read` adds, alone."""
    gin.clear_config()
    with gin.unlock_config():
        read()
    text = gin.config_str()
    gin.clear_config()
    return text
