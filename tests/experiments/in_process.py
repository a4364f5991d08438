"""Runs a program of `experiments` without a new interpreter, through the same flags, errors and exit codes."""

import contextlib
import io
import sys
from unittest import mock

import gin
from absl import flags
from absl.testing import flagsaver

from experiments import cli


def call(program, *args) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a program module, given its flags."""
    out, err = io.StringIO(), io.StringIO()
    argv = [f"{program.__name__.rpartition('.')[2]}.py", *map(str, args)]
    gin.clear_config()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        flags.FLAGS.unparse_flags()
        try:
            with mock.patch.object(sys, "argv", argv):
                cli.call(program.run, cli.parse_flags(argv))
            code = 0
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()
