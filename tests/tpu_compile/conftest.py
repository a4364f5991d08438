"""TPUs to compile for, on a machine without one."""

import pytest

from experiments.tpu_compiler import LIBTPU_ENVIRONMENT, compile_only_device


@pytest.fixture(scope="session")
def devices():
    """Compile-only devices by topology name."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIBTPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield compile_only_device
