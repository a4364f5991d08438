"""Compiled programs are kept where a program says, and nowhere before it says so."""

import jax
import pytest

from models import keep_compiled
from models.assets import cache_dir

_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def settings():
    """Those of the tests come back."""
    before = {name: getattr(jax.config, name) for name in _SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_given_folder(tmp_path):
    folder = keep_compiled(tmp_path / "programs")
    assert folder.is_dir() and jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_without_a_folder_jax_decides_and_then_the_library(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    assert keep_compiled() == tmp_path / "told"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "own"))
    assert keep_compiled() == cache_dir() / "compiled" == tmp_path / "own" / "compiled"
