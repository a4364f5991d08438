"""Programs: `python -m experiments.NAME --help` says what each does."""

import sys

from kvjax.extras import require

try:
    require("experiments", "experiments", "absl", "gin", "matplotlib", "optax", "tqdm")
except ImportError as error:
    if sys.argv[0] != "-m":  # which it is while `python -m` looks for the program
        raise
    sys.exit(str(error))
