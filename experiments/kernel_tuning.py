"""Which block sizes a kernel may have at some shapes, which of them are right, and which is the fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax

from experiments import kernel_timing
from experiments.kernel_cases import KernelCase
from experiments.tpu_compiler import compile_only_device
from pallas_kernels import block_sizes
from pallas_kernels.block_sizes import Choice, Sizes, Table
from pallas_kernels.shapes import DecodeShape

_WORTH = 0.97  # of the heuristic's time, or less: below that two runs differ by as much


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
      sizes: of blocks; the first candidate's are the heuristic's.
      seconds: of a call; None where nothing ran, or what ran was wrong.
      error: largest difference from the reference, relative to its largest number.
      temporary_bytes: in HBM, where it was compiled only.
      problem: why it is refused; None: it is not.
    """

    sizes: Sizes
    seconds: float | None = None
    error: float | None = None
    temporary_bytes: int | None = None
    problem: str | None = None


def left_open(case: KernelCase, shape: DecodeShape, implementation: str, kind: str | None = None) -> Choice:
    """Returns what the kernel of a case leaves open at a shape, on a kind of device or on that of this process.

    Raises:
      NotImplementedError: the kernel does not take the shape.
    """
    table, arrays = Table(asked=[], kind=kind), case.abstract(shape)
    with block_sizes.use(table):
        jax.eval_shape(case.program(shape, implementation), *arrays)
    (choice,) = {(choice.kernel, choice.key): choice for choice in table.asked}.values()
    return choice


def candidates(choice: Choice) -> list[Sizes]:
    """The heuristic's sizes, then one candidate for everything else that can become of them at these shapes."""
    found: dict = {}
    for sizes in (choice.default, *choice.candidates):
        found.setdefault(choice.fit(sizes), sizes)
    return list(found.values())


def run(
    case: KernelCase,
    shape: DecodeShape,
    implementation: str,
    key: jax.Array,
    timer: Callable[[Callable, tuple], float] = kernel_timing.per_call,
) -> Iterator[Trial]:
    """Runs every candidate on the same random inputs; what differs from the reference is refused and not timed.

    Args:
      case: of the kernel.
      shape: of its inputs.
      implementation: that is tuned.
      key: of the inputs.
      timer: seconds of a call, of a function and its arrays.
    """
    choice = left_open(case, shape, implementation)
    kernel, arrays = case.program(shape, implementation), kernel_timing.drawn(case, shape, key)
    want = jax.jit(case.program(shape, "xla"))(*arrays)
    for sizes, table in _tables(choice):
        with block_sizes.use(table):
            try:
                error, wrong = kernel_timing.difference(jax.jit(kernel)(*arrays), want)
                if wrong:
                    yield Trial(sizes, error=error, problem=f"differs from the reference by {error:.1e}")
                else:
                    yield Trial(sizes, timer(kernel, arrays), error)
            except jax.errors.JaxRuntimeError as error:
                yield Trial(sizes, problem=refusal(error))


def compile_only(case: KernelCase, shape: DecodeShape, topology: str) -> Iterator[Trial]:
    """Compiles every candidate for a TPU that is not here."""
    device = compile_only_device(topology)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    arguments = jax.tree.map(place, case.abstract(shape))
    for sizes, table in _tables(left_open(case, shape, "mosaic_tpu", device.device_kind), device.device_kind):
        with block_sizes.use(table):
            try:
                compiled = jax.jit(case.program(shape, "mosaic_tpu")).lower(*arguments).compile()
                yield Trial(sizes, temporary_bytes=compiled.memory_analysis().temp_size_in_bytes)
            except jax.errors.JaxRuntimeError as error:
                yield Trial(sizes, problem=refusal(error))


def best(trials: list[Trial]) -> Trial | None:
    """The fastest; the heuristic's, which is the first, if no other is faster by more than runs differ."""
    timed = [trial for trial in trials if trial.seconds is not None]
    fastest = min(timed, key=lambda trial: trial.seconds, default=None)
    heuristic = trials[0]
    if fastest is None or heuristic.seconds is None or fastest.seconds <= _WORTH * heuristic.seconds:
        return fastest
    return heuristic


def refusal(error: Exception) -> str:
    """Why a candidate has no program, in a few words."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text:
        return "does not fit VMEM" if "vmem" in text else "does not fit the device"
    return text.strip().splitlines()[0][:100]


def _tables(choice: Choice, kind: str | None = None) -> Iterator[tuple[Sizes, Table]]:
    """Candidates with the tables that make the kernel take them."""
    for sizes in candidates(choice):
        entries = {} if sizes is choice.default else {(choice.kernel, choice.key): sizes}
        yield sizes, Table(entries, kind=kind)
