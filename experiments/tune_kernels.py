"""Block sizes of the kernels, measured on the device at hand; or those that compile, for TPUs that are not here.

    python -m experiments.tune_kernels
    python -m experiments.tune_kernels --compile_only --generations=v5e [--kernels=dense,int4] [--json]

The first needs a TPU or a Hopper GPU. For every kernel, at the heads of SmolLM2 and of Llama 3.1 8B, it runs each
candidate, refuses those that differ from the reference, times the others, and writes the fastest to the file that the
kernels read (pallas_kernels/tuned/DEVICE.json; in --output_dir if that is given). Where nothing is faster than the
heuristic, the file says so. The second tells which candidates the compilers take, and times nothing.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import json
import pathlib

import jax
from absl import flags

from experiments import cli, kernel_flags, kernel_tuning
from experiments.kernel_tuning import Trial
from experiments.report import human_bytes
from experiments.tpu_compiler import compile_only_device
from pallas_kernels import block_sizes
from pallas_kernels.block_sizes import Sizes
from pallas_kernels.shapes import LLAMA_8B, SMOLLM2

for _name in ("output_dir", "json"):
    flags.declare_key_flag(_name)
flags.adopt_module_key_flags(kernel_flags)

SHAPES = (SMOLLM2, LLAMA_8B)


def run() -> None:
    """The program."""
    cases, generations = kernel_flags.cases(), kernel_flags.generations()
    runs = [
        (f"{case.name}, heads of {shape.H}", case, dataclasses.replace(shape, S=min(shape.S, case.longest or shape.S)))
        for case in cases
        for shape in SHAPES
    ]
    if kernel_flags.COMPILE_ONLY.value:
        _compile_only(runs, generations)
    else:
        _tune(runs, jax.devices()[0])


def _compile_only(runs, generations) -> None:
    compile_only_device(generations[0].topology)  # or says what is missing
    folder = cli.OUTPUT_DIR.value and kernel_flags.folder(cli.OUTPUT_DIR.value)
    kernel_flags.say(f"TPU compilers of {kernel_flags.versions_line()}; nothing is timed.")
    report = {}
    for generation in generations:
        kernel_flags.say(f"\n{generation.name}: candidates that compile, and the largest of them")
        rows = report[generation.name] = []
        for name, case, shape in runs:
            trials = _watched(kernel_tuning.compile_only(case, shape, generation.topology), name)
            rows.append({"kernel": case.name, "shape": str(shape), "candidates": list(map(dataclasses.asdict, trials))})
            kernel_flags.say(_compiled_line(name, trials))
    kernel_flags.deliver({"generations": report}, folder and folder / "block_size_candidates.json")


def _compiled_line(name: str, trials: list[Trial]) -> str:
    good = [trial for trial in trials if trial.problem is None]
    line = f"{name:<26}{len(good):>3} of {len(trials):<4}"
    if good:
        temporary = human_bytes(max(trial.temporary_bytes for trial in good))
        line += f"{_text(good[-1].sizes)}; the heuristic: {_text(trials[0].sizes)}; temporaries up to {temporary}"
    for reason in sorted({trial.problem for trial in trials if trial.problem}):
        line += f"\n{'':<26}{reason}: {'; '.join(_text(t.sizes) for t in trials if t.problem == reason)}"
    return line


def _tune(runs, device) -> None:
    implementation = kernel_flags.implementation(device)
    folder = kernel_flags.folder(cli.OUTPUT_DIR.value or block_sizes.FOLDER)
    path, seed = block_sizes.path_of(device.device_kind, folder), kernel_flags.seed()
    report = {"device": device.device_kind, "seed": seed, "block_sizes": _entries(path)}
    kernel_flags.say(
        f"{device.device_kind}, {kernel_flags.versions_line()}; {implementation}, inputs of seed {seed}\n"
    )
    wrong = []
    for index, (name, case, shape) in enumerate(runs):
        try:
            choice = kernel_tuning.left_open(case, shape, implementation)
        except NotImplementedError as error:
            kernel_flags.say(f"{name:<26}{error}")
            continue
        key = jax.random.key(seed + index, impl="rbg")
        trials = _watched(kernel_tuning.run(case, shape, implementation, key), name)
        wrong += [f"{name}, {_text(trial.sizes)}" for trial in trials if trial.problem and trial.error is not None]
        best, heuristic = kernel_tuning.best(trials), trials[0]
        kernel_flags.say(_timed_line(name, trials, best))
        if best is not None:
            report["block_sizes"].setdefault(choice.kernel, {})[choice.key] = {
                "sizes": None if best is heuristic else best.sizes,
                "seconds": best.seconds,
                "heuristic_seconds": heuristic.seconds,
                "slots": shape.S,
            }
            kernel_flags.write(report, path)  # a device may go away
    kernel_flags.deliver(report, path)
    if wrong:
        raise ValueError(f"refused, for they differ from the reference: {'; '.join(wrong)}.")


def _timed_line(name: str, trials: list[Trial], best: Trial | None) -> str:
    refused = [trial for trial in trials if trial.problem]
    if best is None:
        return f"{name:<26}none of {len(trials)} candidates runs: {trials[0].problem}"
    ratio = best.seconds / trials[0].seconds if trials[0].seconds else float("nan")
    return (
        f"{name:<26}{1e6 * best.seconds:>9.1f} us{ratio:>6.2f}x the heuristic's time, with {_text(best.sizes)}; "
        f"{len(trials)} candidates, {len(refused)} refused"
    )


def _entries(path: pathlib.Path) -> dict:
    """What was measured before, which is kept where it is not measured again."""
    if not path.is_file():
        return {}
    text = path.read_text("utf-8")
    block_sizes.parse(text, str(path))
    return json.loads(text)["block_sizes"]


def _watched(trials, what: str) -> list[Trial]:
    """All of them, with progress."""
    found = []
    for trial in trials:
        found.append(trial)
        cli.show_progress(f"{what}: {len(found)} candidates")
    cli.show_progress("")
    return found


def _text(sizes: Sizes) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())


if __name__ == "__main__":
    cli.start(run)
