"""Programs: `python -m experiments.NAME --help` says what each does."""

import sys

from experiments import interrupts

_LOOKED_FOR = sys.argv[0] == "-m"  # while `python -m` looks for a program
if _LOOKED_FOR:
    interrupts.quit_in_one_line()  # the imports below take seconds

from kvjax.extras import require

try:
    require("experiments", "experiments", "absl", "gin", "matplotlib", "optax", "tqdm")
except ImportError as error:
    if not _LOOKED_FOR:
        raise
    sys.exit(str(error))
