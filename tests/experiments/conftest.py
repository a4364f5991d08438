"""A small model on disk, and as the programs load it."""

import pytest

from models import load_model
from tests.experiments import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a two-layer random checkpoint."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint):
    """That checkpoint, loaded."""
    return load_model(checkpoint)
