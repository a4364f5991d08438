"""How every program starts: the flags they share, and one line for what a user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from models import FetchError

# One flag has one meaning in all programs; a program adopts them with `flags.adopt_module_key_flags(cli)`.
GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "Config files, read in order.")
GIN_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "Bindings that win over all files.")
MODEL = flags.DEFINE_string("model", None, "smollm2, gemma3-270m, a path, or a name on the hub.")
METHODS = flags.DEFINE_list("methods", None, "Names of files in configs/methods.")
KEEP = flags.DEFINE_float("keep", None, "Fraction of the context that token-budget methods keep.")
CONTEXT = flags.DEFINE_integer("context", None, "Tokens of the context.")
TASKS = flags.DEFINE_string("tasks", None, "A JSONL file of tasks; without it, synthetic ones.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where results go.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def check_flags() -> None:
    """Refuses what no program accepts, by the flag's name.

    Raises:
      ValueError: a config file that does not exist, or a fraction outside (0, 1].
    """
    for path in GIN_FILE.value:
        if not os.path.isfile(path):
            raise ValueError(f"--gin_file: no such file: {path}.")
    if KEEP.value is not None and not 0 < KEEP.value <= 1:
        raise ValueError(f"--keep must be in (0, 1], got {KEEP.value}.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser with its errors in one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(error)


def refuse(*unused: flags.FlagHolder) -> None:
    """Refuses shared flags that a program has no use for, rather than ignore them.

    Raises:
      ValueError: names the first that was given.
    """
    for flag in unused:
        if flag.present:
            raise ValueError(f"--{flag.name} means nothing to this program.")


def show_progress(what: str) -> None:
    """A line that the next one replaces, and an empty one removes; lines below each other where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
    elif what:
        print(what, file=sys.stderr, flush=True)


def call(program: Callable[[], None], argv: Sequence[str]) -> None:
    """Runs a program; bad input, a full disk or a failed download becomes one line and exit status 2."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
        check_flags()
        program()
    except SyntaxError as error:
        _fail(ValueError(_what_gin_could_not_read(error)))
    except (ValueError, OSError, FetchError) as error:
        _fail(error)


def start(program: Callable[[], None]) -> None:
    """The main of a program."""
    logging.set_verbosity(logging.WARNING)  # checkpoints are saved and read with many lines of INFO
    app.run(lambda argv: call(program, argv), flags_parser=parse_flags)


def _what_gin_could_not_read(error: SyntaxError) -> str:
    """gin names the file and line of a config, but nothing of a binding: then all of them are shown."""
    if error.filename and os.path.isfile(error.filename):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    return f"--gin_bindings: {error.msg} In {', '.join(map(repr, GIN_BINDINGS.value))}."


def _fail(error: Exception) -> None:
    message = str(error).strip() or repr(error)
    print(f"error: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(2)
