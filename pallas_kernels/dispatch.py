"""Chooses who computes an op: the XLA reference, or a kernel of the platform a program is lowered for."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax

from pallas_kernels.logits import SoftCap

Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu", "native_cpu"]
"""The jnp reference, the Pallas kernel for TPU (Mosaic) or for Hopper GPUs (Mosaic GPU), the C++ one for CPU."""

# What None may choose. The GPU kernels were never run on a GPU: they must be asked for by name.
_PLATFORM = {"mosaic_tpu": "tpu", "native_cpu": "cpu"}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute an op on one platform."""

    run: Callable[..., Any]  # the signature and the results of the op's reference
    unsupported: Callable[..., str | None]  # (same arguments) -> why it cannot run them, from shapes and dtypes alone


@dataclasses.dataclass(frozen=True)
class Op:
    """An op, with everything that can compute it."""

    name: str
    reference: Callable[..., Any]
    mosaic_tpu: Kernel | None = None
    mosaic_gpu: Kernel | None = None
    native_cpu: Kernel | None = None

    def __call__(self, implementation: Implementation | None, *arrays, **static):
        """Computes `reference(*arrays, **static)`.

        Args:
          implementation: which one, and no other. None: the kernel of the platform that the program is lowered for,
            which need not be the one it is traced on; the reference on other platforms, and for shapes that the
            kernel does not take (said in one log line while tracing). Never "mosaic_gpu": no GPU has run it yet.
          *arrays: positional arguments of the reference; pytrees of arrays, or None.
          **static: its keyword arguments; hashable.

        Raises:
          NotImplementedError: the implementation asked for does not exist, or does not take these shapes.
          ValueError: an `implementation` of another name.
        """
        if implementation not in (None, *get_args(Implementation)):
            raise ValueError(
                f"implementation must be None or one of {', '.join(get_args(Implementation))}, got {implementation!r}."
            )
        reference = functools.partial(self.reference, **static)
        if implementation == "xla":
            return reference(*arrays)
        if implementation is not None:
            reason = self._refusal(implementation, arrays, static)
            if reason is not None:
                raise NotImplementedError(f"{self.name}: {implementation} {reason}.")
            return self._branch(implementation, static)(*arrays)
        branches = {}
        for name, platform in _PLATFORM.items():
            if getattr(self, name) is None:
                continue
            reason = self._refusal(name, arrays, static)
            if reason is None:
                branches[platform] = self._branch(name, static)
            else:
                _log.info("%s: %s %s; XLA computes it.", self.name, name, reason)
        if not branches:
            return reference(*arrays)
        return jax.lax.platform_dependent(*arrays, default=reference, **branches)

    def _refusal(self, name: str, arrays, static) -> str | None:
        kernel = getattr(self, name)
        if kernel is None:
            return "does not exist"
        if isinstance(static.get("scale"), SoftCap):
            return "has no soft cap"
        return kernel.unsupported(*arrays, **static)

    def _branch(self, name: str, static) -> Callable[..., Any]:
        return _traced_once(getattr(self, name).run, self.reference, tuple(sorted(static.items())))


@functools.cache
def _traced_once(run: Callable[..., Any], reference: Callable[..., Any], static) -> Callable[..., Any]:
    """A kernel that is differentiated through its reference.

    `platform_dependent` traces every branch whatever the platform. The same jitted function for the same arguments
    makes that a look-up after the first of a model's layers.
    """
    kernel = jax.custom_jvp(functools.partial(run, **dict(static)))
    kernel.defjvp(lambda primals, tangents: jax.jvp(functools.partial(reference, **dict(static)), primals, tangents))
    return jax.jit(lambda *arrays: kernel(*_varying_alike(arrays)))


def result_like(shape: Sequence[int], dtype, *arrays: jax.Array) -> jax.ShapeDtypeStruct:
    """What a kernel says of a result that depends on all the arrays: inside `shard_map`, also how it varies."""
    axes = jax.sharding.ManualAxisType(varying=_varying(arrays))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def _varying(arrays) -> frozenset[str]:
    """The mesh axes of an enclosing `shard_map` along which one of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))


def _varying_alike(arrays):
    """The arrays, all of them varying where one does: kernels mix them, and cannot cast inside."""
    axes = _varying(arrays)
    missing = lambda x: tuple(axes - jax.typeof(x).manual_axis_type.varying)
    cast = lambda x: jax.lax.pcast(x, missing(x), to="varying") if missing(x) else x
    return jax.tree.map(cast, arrays) if axes else arrays
