"""`jax.jit` for tests: the same programs, compiled two and a half times faster and run a little slower."""

from __future__ import annotations

import functools

import jax

_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if jax.__version_info__ < (0, 11):  # which has no other emitters
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False  # the older ones make less code of a fusion: half the time

quick_jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
