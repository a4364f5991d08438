"""Where compiled programs are kept from one process to the next."""

from __future__ import annotations

import pathlib

import jax

from models import assets


def keep_compiled(folder: str | pathlib.Path | None = None) -> pathlib.Path:
    """Lets JAX keep every program that it compiles, and read those of earlier processes instead of compiling again.

    For programs and notebooks, before anything is compiled; no import of this library does so. JAX tells programs apart
    by their code, options and processor, and removes none of them by itself.

    Args:
      folder: where they are kept; None: where JAX was told already (`JAX_COMPILATION_CACHE_DIR`), else `compiled` in
        the folder of `models.assets.cache_dir`.

    Returns:
      The folder.
    """
    if folder is None:
        folder = jax.config.jax_compilation_cache_dir or assets.cache_dir() / "compiled"
    folder = pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A first answer compiles some eighty programs, most of them in milliseconds each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
