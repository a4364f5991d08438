"""Speed of the kernels beside the bandwidth of the device, XLA and others' attention; or their bytes, without a device.

    python -m experiments.bench_kernels --compile_only [--json]
    python -m experiments.bench_kernels --estimate [--json]
    python -m experiments.bench_kernels [--json]

The first two need no accelerator. Both compile every kernel for four TPU generations, at 8 KV heads of 128 with 4
queries each. The first prints what a decode step reads, the time that takes at the published bandwidth, and what the
compilers needed besides; the second how long the compilers' schedules say that it takes. The third needs a GPU or a
TPU: it checks every kernel against its reference on fresh random inputs, times both in one run with a plain copy on
the device, and writes the raw figures to experiments/results.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
from absl import flags

from experiments import cli, kernel_estimates, kernel_flags, kernel_timing
from experiments.kernel_cases import DENSE, KernelCase
from experiments.kernel_estimates import Estimate
from experiments.kernel_timing import Timing
from experiments.report import human_bytes
from experiments.stopwatch import seconds
from experiments.tpu_compiler import Generation, compile_for, compile_only_device
from pallas_kernels import block_sizes
from pallas_kernels.shapes import LLAMA_8B, DecodeShape

for _name in ("output_dir", "json"):
    flags.declare_key_flag(_name)
flags.adopt_module_key_flags(kernel_flags)
_CONTEXTS = flags.DEFINE_list("contexts", ["4096", "32768", "131072"], "Slots of the cache; --estimate: 32768.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Sequences; --estimate: 1.")
_CHANNELS = flags.DEFINE_integer("channels", LLAMA_8B.H, "Of a head.")
_QUERIES = flags.DEFINE_integer("queries", LLAMA_8B.G, "Query heads of a KV head.")
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Print what the TPU compilers' schedules say; needs no accelerator.")

_RESULTS = pathlib.Path(__file__).parent / "results"
_NAMES = f"{'kernel':<12}{'batch':>6}{'context':>9}"


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What the TPU compilers say of one kernel at one shape.

    Attributes:
      name: of the case.
      batch: sequences.
      context: slots.
      argument_bytes: all arguments in HBM, padding included; what a step reads. None where no kernel was compiled.
      temporary_bytes: by generation.
      compile_seconds: by generation.
      refused: by generation, why there is no program.
    """

    name: str
    batch: int
    context: int
    argument_bytes: int | None
    temporary_bytes: dict[str, int]
    compile_seconds: dict[str, float]
    refused: dict[str, str]


def footprints(cases: Sequence[KernelCase], shapes: Sequence[DecodeShape], generations: Sequence[Generation]):
    """Yields a `Footprint` for every case at every shape that it is run at; progress goes to stderr."""
    runs = [(case, shape) for case in cases for shape in shapes if case.longest is None or shape.S <= case.longest]
    for done, (case, shape) in enumerate(runs):
        arguments = case.abstract(shape)
        size, temporary, took, refused = None, {}, {}, {}
        for generation in generations:
            what = f"compiling {case.name}, {shape.B} x {shape.S}, for {generation.name}"
            cli.show_progress(f"[{done + 1}/{len(runs)}] {what}")
            device = compile_only_device(generation.topology)
            program = case.program(shape, "mosaic_tpu")
            try:
                took[generation.name], compiled = seconds(lambda: compile_for(device, program, *arguments))
            except NotImplementedError as error:
                refused[generation.name] = str(error)
                continue
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                took.pop(generation.name, None)
                refused[generation.name] = "does not fit one chip"
                continue
            memory = compiled.memory_analysis()
            size = size or memory.argument_size_in_bytes
            temporary[generation.name] = memory.temp_size_in_bytes
        cli.show_progress("")
        yield Footprint(case.name, shape.B, shape.S, size, temporary, took, refused)


def footprint_header(generations: Sequence[Generation]) -> str:
    """Titles of `footprint_line`."""
    bounds = "".join(f"{generation.name:>10}" for generation in generations)
    return f"{_NAMES}{'reads':>11}{'of dense':>10}{bounds}{'temporaries':>13}{'compiled':>10}"


def footprint_line(row: Footprint, case: KernelCase, dense: int | None, generations: Sequence[Generation]) -> str:
    """One row: `dense` is what the dense kernel reads at this shape, if it is known."""
    start = f"{row.name:<12}{row.batch:>6}{row.context:>9}"
    if row.argument_bytes is None:
        return f"{start}  {next(iter(row.refused.values()))}"
    ratio = f"{row.argument_bytes / dense:.3f}" if dense and case.every_step else ""
    bounds = ""
    for generation in generations:
        time = row.argument_bytes / generation.device_gigabytes_per_second / 1e9
        bound = _duration(time) if case.bandwidth_bound else ""
        bounds += f"{'no room' if generation.name in row.refused else bound:>10}"
    return (
        f"{start}{human_bytes(row.argument_bytes):>11}{ratio:>10}{bounds}"
        f"{human_bytes(max(row.temporary_bytes.values())):>13}{max(row.compile_seconds.values()):>8.1f} s"
    )


def timing_header() -> str:
    """Titles of `timing_line`."""
    titles = f"{_NAMES}{'time':>10}{'GB/s':>8}{'of copy':>9}{'of dense':>10}{'error':>10}"
    return titles + "".join(f"{name:>9}" for name in ("XLA", "jax", "torch"))


def timing_line(row: Timing, case: KernelCase, dense: float | None, copy: float) -> str:
    """One row; the last columns say how many times as long others took.

    Args:
      row: of one kernel.
      case: what was run.
      dense: seconds of the dense kernel at this shape, if it was run.
      copy: GB/s of a plain copy.
    """
    start = f"{row.name:<12}{row.batch:>6}{row.context:>9}"
    if row.seconds is None:
        return f"{start}  {row.problem}"
    rate = row.read_bytes / row.seconds / 1e9
    others = (row.xla_seconds, row.jax_seconds, row.torch_seconds)
    ratios = "".join(f"{'' if other is None else f'{other / row.seconds:.2f}x':>9}" for other in others)
    of_dense = f"{row.seconds / dense:.3f}" if dense and case.every_step else ""
    speed = f"{_duration(row.seconds):>10}{rate:>8.0f}" + (f"{rate / copy:>9.0%}" if case.bandwidth_bound else " " * 9)
    line = f"{start}{speed}{of_dense:>10}{row.error:>10.1e}{ratios}"
    return line if row.problem is None else f"{line}  {row.problem}"


def run() -> None:
    """The program."""
    cases, generations = kernel_flags.cases(), kernel_flags.generations()
    for flag in (_CHANNELS, _QUERIES):
        if flag.value < 1:
            raise ValueError(f"--{flag.name} must be at least 1, got {flag.value}.")
    shapes = [
        dataclasses.replace(LLAMA_8B, B=batch, S=slots, H=_CHANNELS.value, G=_QUERIES.value)
        for slots in _whole_numbers(_CONTEXTS, multiple_of=32)
        for batch in _whole_numbers(_BATCHES)
    ]
    if _ESTIMATE.value:
        if kernel_flags.COMPILE_ONLY.value:
            raise ValueError("--estimate and --compile_only are two programs: give one of them.")
        _estimate(cases, _one_shape(shapes), generations)
    elif kernel_flags.COMPILE_ONLY.value:
        _compile_only(cases, shapes, generations)
    else:
        _time(cases, shapes)


def _compile_only(cases, shapes, generations) -> None:
    compile_only_device(generations[0].topology)  # or says what is missing
    folder = cli.OUTPUT_DIR.value and kernel_flags.folder(cli.OUTPUT_DIR.value)
    kernel_flags.say(
        f"{_heads(shapes)}; TPU compilers of {kernel_flags.versions_line()}\n"
        f"Under a generation: reading that once at {_bandwidths(generations)}.\n\n{footprint_header(generations)}"
    )
    rows, dense, by_name = [], {}, {case.name: case for case in cases}
    for row in footprints(cases, shapes, generations):
        rows.append(row)
        if row.name == DENSE:
            dense[row.batch, row.context] = row.argument_bytes
        kernel_flags.say(footprint_line(row, by_name[row.name], dense.get((row.batch, row.context)), generations))
    bandwidths = {g.name: g.device_gigabytes_per_second for g in generations}
    report = {"published_gigabytes_per_second": bandwidths, "footprints": list(map(dataclasses.asdict, rows))}
    kernel_flags.deliver(report, folder and folder / "kernel_footprints.json")


def _one_shape(shapes: Sequence[DecodeShape]) -> DecodeShape:
    """The shape that --contexts and --batches say; 1 sequence of 32,768 slots without them.

    Raises:
      ValueError: they say several.
    """
    chosen = shapes
    for flag, name, default in ((_CONTEXTS, "S", LLAMA_8B.S), (_BATCHES, "B", LLAMA_8B.B)):
        wanted = {getattr(shape, name) for shape in shapes} if flag.present else {default}
        if len(wanted) > 1:
            raise ValueError(f"--estimate takes one of --{flag.name}, got {','.join(flag.value)!r}.")
        chosen = [dataclasses.replace(shape, **{name: min(wanted)}) for shape in chosen]
    return chosen[0]


_TRUST = """
Of one JAX device, from the final schedules of the TPU compilers. HBM: the arguments read once at the published
bandwidth. vector: arithmetic slots of the vector unit, all of them in use; issue: one bundle of instructions a cycle;
no program takes less than these two. latency: bundles with the waits that the compiler expects. of bandwidth: HBM over
the longer of HBM and latency, plus the shorter of one tile, which nothing hides. Every tile counts as attended to,
those that a prefill skips too.
No figure was checked on a chip. Not counted: XLA's operations before and behind a kernel, starts of copies, HBM that
gives less than published (about 85 % in practice). Predictors of this form, cycles beside bytes, are said to be within
6 % on most kernels; latencies that follow from one another across a loop's turns they count too low.
"""


def estimate_header() -> str:
    """Titles of `estimate_line`."""
    return f"{'kernel':<12}{'generation':<12}" + "".join(
        f"{title:>12}" for title in ("HBM", "vector", "issue", "latency")
    ) + f"{'of bandwidth':>14}"


def estimate_line(row: Estimate, case: KernelCase) -> str:
    """One row."""
    times = "".join(f"{time:>9.1f} us" for time in (row.hbm_us, row.vector_us, row.issue_us, row.latency_us))
    share = f"{row.share_of_bandwidth:.0%}" if case.bandwidth_bound else ""
    return f"{row.kernel:<12}{row.generation:<12}{times}{share:>14}".rstrip()


def _estimate(cases, shape: DecodeShape, generations) -> None:
    folder = cli.OUTPUT_DIR.value and kernel_flags.folder(cli.OUTPUT_DIR.value)
    compile_only_device(generations[0].topology)  # or says what is missing
    kernel_flags.say(
        f"{shape.B} x {shape.S} slots, {_heads([shape])}; TPU compilers of {kernel_flags.versions_line()}\n"
        f"HBM at {_bandwidths(generations)}.\n\n{estimate_header()}"
    )
    rows = []
    by_name = {case.name: case for case in cases}
    for row in kernel_estimates.estimates(cases, shape, generations):
        rows.append(row)
        case = by_name[row.kernel]
        slots = kernel_estimates.shape_of(case, shape).S
        kernel_flags.say(estimate_line(row, case) + ("" if slots == shape.S else f"  of {slots} tokens"))
    kernel_flags.say(_TRUST.rstrip())
    listed = [{name: value for name, value in dataclasses.asdict(row).items() if name != "tiles"} for row in rows]
    if cli.JSON.value:
        print(json.dumps(listed, indent=1))
    if folder:
        kernel_flags.write({"shape": dataclasses.asdict(shape), "estimates": listed}, folder / "kernel_estimates.json")
        kernel_flags.say(f"\nWrote {folder / 'kernel_estimates.json'}.")


def _time(cases, shapes) -> None:
    device = jax.devices()[0]
    implementation = kernel_flags.implementation(device)
    folder, seed = kernel_flags.folder(cli.OUTPUT_DIR.value or _RESULTS), kernel_flags.seed()
    tuned = bool(block_sizes.read(device.device_kind).sizes)
    copy = kernel_timing.copy_gigabytes_per_second()
    kernel_flags.say(
        f"{device.device_kind}, {kernel_flags.versions_line()}\n"
        f"{_heads(shapes)}; {implementation}, inputs of seed {seed}, block sizes {'tuned' if tuned else 'not tuned'}\n"
        f"A plain copy on the device: {copy:.0f} GB/s, bytes read plus bytes written.\n\n{timing_header()}"
    )
    rows, dense, by_name = [], {}, {case.name: case for case in cases}
    for row in _timings(cases, shapes, implementation, seed):
        rows.append(row)
        if row.name == DENSE and row.seconds is not None:
            dense[row.batch, row.context] = row.seconds
        kernel_flags.say(timing_line(row, by_name[row.name], dense.get((row.batch, row.context)), copy))
    kernel_flags.say(
        "\nGB/s: arguments over time. error: the largest difference from the reference. XLA, jax, torch: how many\n"
        "times as long the reference, jax.nn.dot_product_attention and torch's scaled_dot_product_attention took."
    )
    report = {
        "device": device.device_kind,
        "implementation": implementation,
        "seed": seed,
        "tuned": tuned,
        "copy_gigabytes_per_second": copy,
        "timings": list(map(dataclasses.asdict, rows)),
    }
    now = datetime.datetime.now(datetime.timezone.utc)
    kernel_flags.deliver(report, folder / f"kernels_{block_sizes.file_name(device.device_kind)}_{now:%Y%m%d_%H%M}.json")
    wrong = [f"{row.name} {row.batch} x {row.context}" for row in rows if row.wrong]
    if wrong:
        raise ValueError(f"kernels that differ from their reference: {', '.join(wrong)}.")


def _timings(cases, shapes, implementation: str, seed: int) -> Iterator[Timing]:
    runs = [(case, shape) for case in cases for shape in shapes if case.longest is None or shape.S <= case.longest]
    for done, (case, shape) in enumerate(runs):
        cli.show_progress(f"[{done + 1}/{len(runs)}] timing {case.name}, {shape.B} x {shape.S}")
        key = jax.random.key(seed + done, impl="rbg")  # the default takes longer to compile than the kernels
        timing = kernel_timing.time_kernel(case, shape, implementation, key)
        cli.show_progress("")
        yield timing


def _whole_numbers(flag: flags.FlagHolder, multiple_of: int = 1) -> list[int]:
    try:
        numbers = [int(text) for text in flag.value]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or any(n % multiple_of for n in numbers):
        what = "whole numbers of at least 1" if multiple_of == 1 else f"multiples of {multiple_of}"
        raise ValueError(f"--{flag.name} must be {what}, got {','.join(flag.value)!r}.")
    return sorted(set(numbers))


def _heads(shapes: Sequence[DecodeShape]) -> str:
    shape = shapes[0]
    return f"{shape.K} KV heads of {shape.H}, {shape.G} queries each, {shape.dtype}"


def _bandwidths(generations: Sequence[Generation]) -> str:
    """Of a JAX device."""
    share = lambda g: "" if g.devices == 1 else f", 1 of {g.devices} devices of a chip"
    return ", ".join(f"{g.device_gigabytes_per_second:.0f} GB/s ({g.name}{share(g)})" for g in generations)


def _duration(time: float) -> str:
    return f"{time * 1e6:.1f} us" if time < 1e-3 else f"{time * 1e3:.2f} ms"


if __name__ == "__main__":
    cli.start(run)
