"""How long kernels take on the device at hand, and what else takes to do the same."""

from __future__ import annotations

import dataclasses
import importlib
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

import kvjax
from experiments.kernel_cases import DENSE, KernelCase
from experiments.stopwatch import seconds
from pallas_kernels.shapes import DecodeShape

_REPEATS = 5  # of which the median counts
_LONG_ENOUGH = 0.05  # seconds of a timed loop: a launch from Python is noise in it
_COPIED = 2**28  # float32 numbers, 1 GB

# Of the largest number that the reference gives: the kernel and the reference round queries, probabilities or
# dequantized values to bfloat16 at different places, half a unit in the last of 8 bits each, and sums add them up.
_BFLOAT16 = 2e-2


@dataclasses.dataclass(frozen=True)
class Timing:
    """One kernel at one shape.

    Attributes:
      name: of the case.
      batch: sequences.
      context: slots.
      read_bytes: the arguments.
      seconds: of a call; None if the kernel does not run here.
      error: largest difference from the reference, relative to its largest number.
      wrong: whether that is more than rounding explains.
      xla_seconds: of the reference.
      jax_seconds: of `jax.nn.dot_product_attention`, for the dense case.
      torch_seconds: of torch's `scaled_dot_product_attention`, for the dense case.
      problem: what did not run, and why.
    """

    name: str
    batch: int
    context: int
    read_bytes: int
    seconds: float | None = None
    error: float | None = None
    wrong: bool = False
    xla_seconds: float | None = None
    jax_seconds: float | None = None
    torch_seconds: float | None = None
    problem: str | None = None


def time_kernel(case: KernelCase, shape: DecodeShape, implementation: str, key: jax.Array) -> Timing:
    """Checks a kernel against its reference and times both, and for the dense case its peers."""
    row = Timing(case.name, shape.B, shape.S, kvjax.nbytes(case.abstract(shape)))
    kernel, reference = case.program(shape, implementation), case.program(shape, "xla")
    try:
        jax.eval_shape(kernel, *case.abstract(shape))
    except NotImplementedError as error:
        return dataclasses.replace(row, problem=str(error))
    try:
        arrays = drawn(case, shape, key)
        error, wrong = difference(jax.jit(kernel)(*arrays), jax.jit(reference)(*arrays))
        row = dataclasses.replace(row, error=error, wrong=wrong)
        row = dataclasses.replace(row, seconds=per_call(kernel, arrays))
        row = dataclasses.replace(row, xla_seconds=per_call(reference, arrays))
        if case.name == DENSE:
            row = _beside_peers(row, arrays, implementation)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row = dataclasses.replace(row, problem="does not fit the device")
    return row


def drawn(case: KernelCase, shape: DecodeShape, key: jax.Array) -> tuple:
    """The case's arrays, made on the device."""
    return jax.block_until_ready(jax.jit(lambda key: case.draw(shape, key))(key))


def difference(got, want) -> tuple[float, bool]:
    """(largest difference relative to the largest number, whether that is too much) of two results.

    Packed words must be equal, and numbers that are not finite must be the same.
    """
    worst, wrong = 0.0, False
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(b.dtype, jnp.integer):
            share = float(jnp.mean(a != b))
            worst, wrong = max(worst, share), wrong or share > 0
            continue
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        finite = jnp.isfinite(b)
        wrong |= bool(jnp.any(jnp.where(finite, ~jnp.isfinite(a), a != b)))
        largest = float(jnp.max(jnp.where(finite, jnp.abs(b), 0.0)))
        error = float(jnp.max(jnp.where(finite & jnp.isfinite(a), jnp.abs(a - b), 0.0))) / max(largest, 1e-30)
        worst, wrong = max(worst, error), wrong or error > _BFLOAT16
    return worst, wrong


def per_call(function: Callable, arrays: tuple) -> float:
    """Seconds of one call: the median of timed loops on the device, long enough for launches not to count."""

    @jax.jit
    def loop(count, *arrays):
        def body(_, result):
            # Without the barrier the call would be the same in every turn, and moved out of the loop.
            inputs, _ = jax.lax.optimization_barrier((arrays, result))
            return function(*inputs)

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arrays))
        return jax.lax.fori_loop(0, count, body, nothing)

    return _settled(lambda count: seconds(lambda: jax.block_until_ready(loop(count, *arrays)))[0])


def _settled(timed: Callable[[int], float]) -> float:
    """Seconds of one of `count` calls, which `timed(count)` takes together."""
    timed(1)  # compiles
    count = max(1, round(_LONG_ENOUGH / timed(1)))
    count = max(1, round(_LONG_ENOUGH / timed(count) * count))
    return statistics.median(timed(count) for _ in range(_REPEATS)) / count


def copy_gigabytes_per_second(numbers: int = _COPIED) -> float:
    """Bytes read plus bytes written of the simplest program that does both."""
    x = jnp.zeros((numbers,), jnp.float32)
    return 2 * x.nbytes / per_call(lambda x: x + 1.0, (x,)) / 1e9


def _beside_peers(row: Timing, arrays: tuple, implementation: str) -> Timing:
    """Adds what other implementations of dense attention take, and why one of them did not run."""
    q, k, v = arrays[:3]
    problems = []
    try:
        row = dataclasses.replace(row, jax_seconds=_jax_attention(q, k, v, implementation))
    except Exception as error:  # cuDNN refuses shapes with errors of many types
        problems.append(f"jax.nn: {_first_line(error)}")
    if implementation == "mosaic_gpu":
        try:
            row = dataclasses.replace(row, torch_seconds=_torch_attention(q.shape, k.shape))
        except Exception as error:  # not installed, no CUDA, no memory
            problems.append(f"torch: {_first_line(error)}")
    return dataclasses.replace(row, problem="; ".join(problems) or None)


def _jax_attention(q, k, v, implementation: str) -> float:
    """Its keys and values are [B, S, K, H]; the transposition is not timed."""
    turned = jax.block_until_ready([x.swapaxes(1, 2).copy() for x in (k, v)])
    which = "cudnn" if implementation == "mosaic_gpu" else None
    attention = lambda *arrays: jax.nn.dot_product_attention(*arrays, implementation=which)
    return per_call(attention, (q, *turned))


def _torch_attention(q_shape, k_shape) -> float:
    """On numbers of its own, in bfloat16."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise RuntimeError("it has no CUDA")
    B, T, N, H = q_shape
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    q, k, v = normal(B, N, T, H), normal(*k_shape), normal(*k_shape)

    def calls(count: int) -> None:
        for _ in range(count):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.cuda.synchronize()

    try:
        return _settled(lambda count: seconds(lambda: calls(count))[0])
    finally:
        torch.cuda.empty_cache()  # of earlier shapes: JAX needs the rest


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:100]
