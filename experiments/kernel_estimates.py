"""How long the TPU compiler's own schedules say that kernels take, without a TPU.

A program of its own compiles, since libtpu reads the flags of its dumps once, when it is loaded. See
`experiments.kernel_schedules` for what a schedule says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from experiments import kernel_schedules
from experiments.kernel_cases import CASES, KernelCase
from experiments.tpu_compiler import GENERATIONS, Generation, compile_for, compile_only_device
from pallas_kernels.shapes import DecodeShape


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Times of one kernel on one JAX device, in microseconds.

    Attributes:
      kernel: name of the case.
      generation: of the TPU.
      hbm_us: its arguments, read once at the published bandwidth.
      vector_us: arithmetic of the vector unit with every slot in use.
      issue_us: one bundle a cycle, no waiting.
      latency_us: bundles and the waits that the compiler expects between them.
      tiles: steps of the grid, of which each reads a tile while the one before it is worked on.
    """

    kernel: str
    generation: str
    hbm_us: float
    vector_us: float
    issue_us: float
    latency_us: float
    tiles: int

    @property
    def share_of_bandwidth(self) -> float:
        """HBM time over that of the kernel, whose first tile is read, and whose last is worked on, alone."""
        longer, shorter = max(self.hbm_us, self.latency_us), min(self.hbm_us, self.latency_us)
        return self.hbm_us / (longer + shorter / self.tiles)


def estimates(
    cases: Sequence[KernelCase], shape: DecodeShape, generations: Sequence[Generation]
) -> Iterator[Estimate]:
    """Yields an `Estimate` for every case and generation, as they are compiled by another process.

    Raises:
      ValueError: there is no TPU compiler here, or one of the programs has no estimate, with the reason.
    """
    compile_only_device(generations[0].topology)  # or says what is missing
    asked = dict(
        cases=[case.name for case in cases],
        generations=[generation.name for generation in generations],
        shape=dataclasses.asdict(shape),
    )
    with tempfile.TemporaryDirectory() as folder:
        flags = kernel_schedules.DUMP_FLAGS.format(folder=folder)
        own = os.environ.get("LIBTPU_INIT_ARGS", "")
        # No compilation cache: what it holds is not compiled, and leaves no dump.
        environment = os.environ | {"LIBTPU_INIT_ARGS": f"{own} {flags}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-m", __name__, folder, json.dumps(asked)]
        environment |= {"JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
            try:
                for line in child.stdout:
                    answer = json.loads(line)
                    if "error" in answer:
                        raise ValueError(answer["error"])
                    yield Estimate(**answer)
                if child.wait():
                    raise ValueError(f"the program that compiles ended with status {child.returncode}.")
            finally:
                child.kill()  # where nobody wants the rest


def shape_of(case: KernelCase, shape: DecodeShape) -> DecodeShape:
    """The shape at which a case is estimated: no longer than it is run at."""
    return dataclasses.replace(shape, S=min(shape.S, case.longest or shape.S))


def estimate(case: KernelCase, shape: DecodeShape, generation: Generation, folder: pathlib.Path) -> Estimate:
    """Compiles a kernel in this process, whose libtpu dumps to `folder`, and reads the schedule."""
    for path in folder.iterdir():
        path.unlink()
    shape, device = shape_of(case, shape), compile_only_device(generation.topology)
    compiled = compile_for(device, case.program(shape, "mosaic_tpu"), *case.abstract(shape))
    kernels = kernel_schedules.read(folder).kernels
    if not kernels:
        raise ValueError(f"{case.name} for {generation.name}: no kernel was dumped to {folder}.")
    cycles = sum((kernel.cycles() for kernel in kernels), kernel_schedules.Cycles(0, 0, 0))
    microseconds = lambda count: count / (generation.gigahertz * 1e3)
    return Estimate(
        kernel=case.name,
        generation=generation.name,
        hbm_us=compiled.memory_analysis().argument_size_in_bytes / (generation.device_gigabytes_per_second * 1e3),
        vector_us=microseconds(cycles.vector),
        issue_us=microseconds(cycles.issue),
        latency_us=microseconds(cycles.latency),
        tiles=sum(max(kernel.steps, 1) for kernel in kernels),
    )


def _child(folder: str, asked: str) -> None:
    """Prints a line of JSON for every estimate."""
    asked = json.loads(asked)
    shape = DecodeShape(**asked["shape"])
    named = lambda known, names: [x for x in known if x.name in names]
    for case in named(CASES, asked["cases"]):
        for generation in named(GENERATIONS, asked["generations"]):
            try:
                answer = dataclasses.asdict(estimate(case, shape, generation, pathlib.Path(folder)))
            except (ValueError, NotImplementedError) as error:
                answer = {"error": f"{case.name} for {generation.name}: {error}"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _child(*sys.argv[1:])
