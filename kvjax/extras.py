"""Says which extra of the installation brings a package that is missing."""

from __future__ import annotations

import importlib.util


def require(what: str, extra: str, *modules: str) -> None:
    """Checks that the modules which an extra brings are installed, without importing them.

    Args:
      what: what needs them, for the error.
      extra: of setup.cfg.
      modules: top-level ones.

    Raises:
      ImportError: names those that are missing, and the command that installs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}: pip install 'kvjax[{extra}]'.", name=missing[0])
