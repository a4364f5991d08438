"""Compile-only TPUs, for every test of the lane."""

import pytest

from experiments.tpu_compiler import LIBTPU_ENVIRONMENT, compile_for, compile_only_device


@pytest.fixture(scope="session")
def devices():
    """Compile-only devices by topology name; libtpu reads its settings from the environment when it loads."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIBTPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield compile_only_device


@pytest.fixture(scope="session")
def compiled(devices):
    """`(function, arguments without numbers, topology)` -> the program, compiled for one such chip."""
    return lambda function, args, topology: compile_for(devices(topology), function, *args)
