"""Ends a program in one sentence where Ctrl-C comes while it still imports what it needs."""

from __future__ import annotations

import os
import signal


def quit_in_one_line() -> None:
    """Ends the process at Ctrl-C with a line instead of the traceback of whatever was being imported."""

    def quit(number, frame) -> None:
        os.write(2, b"\ninterrupted.\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, quit)


def raise_again() -> None:
    """Makes Ctrl-C a KeyboardInterrupt again, as Python does: the program has started, and may have work to keep."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
