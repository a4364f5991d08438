"""How every program starts: absl flags, and one line for what a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from models import FetchError


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser with its errors in one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(error)


def call(program: Callable[[], None], argv: Sequence[str]) -> None:
    """Runs a program; bad input, a full disk or a failed download becomes one line and exit status 2."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
        program()
    except (ValueError, OSError, FetchError) as error:
        _fail(error)


def start(program: Callable[[], None]) -> None:
    """The main of a program."""
    app.run(lambda argv: call(program, argv), flags_parser=parse_flags)


def _fail(error: Exception) -> None:
    message = str(error).strip() or repr(error)
    print(f"error: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(2)
