"""The search for block sizes: what is tried, refused, chosen and written. Kernels are interpreted, times made up."""

import dataclasses
import functools
import json
from unittest import mock

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments import kernel_flags, kernel_timing, kernel_tuning, tpu_compiler
from experiments import tune_kernels as program
from experiments.kernel_cases import CASES
from experiments.kernel_tuning import Trial
from pallas_kernels import block_sizes
from pallas_kernels.decode_attention import mosaic_tpu as kernel
from pallas_kernels.shapes import DecodeShape
from tests.experiments import in_process

tune = functools.partial(in_process.call, program)
DENSE = next(case for case in CASES if case.name == "dense")
TINY = DecodeShape(K=1, G=2, S=300, H=64)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Random numbers of numpy, for which nothing is compiled."""
    monkeypatch.setattr(kernel_timing, "drawn", lambda case, shape, key: shape.draw(0))


def tiles() -> tuple[int, ...]:
    """The grid of the dense kernel with the sizes in use."""
    q, k, v, _, k_pos, _ = TINY.abstract()
    sizes = kernel._sizes(q, k, v, k_pos)
    return sizes.slots, sizes.splits


def by_tile(times: dict[int, float]):
    """A timer that knows how long a tile of so many slots takes."""
    return lambda function, arrays: times[tiles()[0]]


def test_every_candidate_that_differs_is_tried_once():
    found = kernel_tuning.candidates(kernel_tuning.left_open(DENSE, TINY, "mosaic_tpu"))
    # The heuristic takes all 300 slots at once. There are three tiles of 128, or two of 256, which two parts can share.
    assert found == [
        {"heads": 1, "slots": 4096, "splits": 2},
        {"heads": 1, "slots": 128, "splits": 1},
        {"heads": 1, "slots": 256, "splits": 1},
        {"heads": 1, "slots": 256, "splits": 2},
    ]


def test_candidates_are_checked_and_then_timed(monkeypatch):
    monkeypatch.setattr(kernel_tuning, "candidates", lambda choice: [choice.default, choice.candidates[3]])
    with pltpu.force_tpu_interpret_mode():
        trials = list(kernel_tuning.run(DENSE, TINY, "mosaic_tpu", None, by_tile({300: 3.0, 256: 2.0})))
    assert [trial.seconds for trial in trials] == [3.0, 2.0]
    assert all(trial.error < 1e-4 and trial.problem is None for trial in trials)
    assert kernel_tuning.best(trials).sizes == {"heads": 1, "slots": 256, "splits": 2}


def test_wrong_and_oversized_candidates_are_never_timed():
    def op(q, *arrays, implementation):
        slots, splits = tiles()
        if slots == 128 and implementation != "xla":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem")
        return q * 1.1 if splits == 2 else q

    timed = []
    timer = lambda function, arrays: timed.append(tiles()) or 1.0
    case = dataclasses.replace(DENSE, op=op)
    trials = list(kernel_tuning.run(case, TINY, "mosaic_tpu", None, timer))
    assert timed == [(300, 1), (256, 1)]
    assert trials[1] == Trial(trials[1].sizes, problem="does not fit VMEM")
    assert trials[3].problem == "differs from the reference by 1.0e-01" and trials[3].seconds is None


def test_the_heuristic_stays_unless_something_is_clearly_faster():
    trial = lambda seconds: Trial({}, seconds)
    trials = [trial(1.0), trial(0.98), trial(None)]
    assert kernel_tuning.best(trials) is trials[0]
    assert kernel_tuning.best([*trials, trial(0.9)]).seconds == 0.9
    assert kernel_tuning.best([trial(None), trial(5.0)]).seconds == 5.0
    assert kernel_tuning.best([trial(None)]) is None


@pytest.fixture
def on_cpu(monkeypatch):
    """Something that asks for sizes in the place of the kernel, which takes long to interpret."""

    def op(q, *arrays, implementation):
        return q * tiles()[0] / tiles()[0]

    monkeypatch.setattr(kernel_flags, "implementation", lambda device: "mosaic_tpu")
    monkeypatch.setattr(kernel_flags, "cases", lambda: [dataclasses.replace(DENSE, op=op)])
    monkeypatch.setattr(program, "SHAPES", (TINY,))


def test_what_is_written_is_what_the_kernel_reads(on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(block_sizes, "FOLDER", tmp_path)
    path, old = tmp_path / "cpu.json", {"kept.mosaic_tpu": {"K1": {"sizes": {"slots": 3}}}}
    path.write_text(json.dumps({"block_sizes": old}))
    with mock.patch.object(kernel_tuning.run, "__defaults__", (by_tile({300: 3.0, 128: 4.0, 256: 2.0}),)):
        code, out, err = tune("--seed=1")
    assert code == 0, err
    assert "2000000.0 us  0.67x the heuristic's time, with heads=1 slots=256 splits=1; 4 candidates, 0 refused" in out
    report = json.loads(path.read_text())
    assert report["block_sizes"]["kept.mosaic_tpu"] == old["kept.mosaic_tpu"]
    ((_, entry),) = report["block_sizes"]["decode_attention.mosaic_tpu"].items()
    sizes = dict(heads=1, slots=256, splits=1)
    assert entry == {"sizes": sizes, "seconds": 2.0, "heuristic_seconds": 3.0, "slots": 300}
    assert report["device"] == "cpu" and report["versions"]["jax"] == jax.__version__ and report["date"]
    block_sizes._read.cache_clear()
    assert tiles() == (256, 1)
    block_sizes._read.cache_clear()


def test_json_is_printed_instead_of_the_table(on_cpu, tmp_path):
    with mock.patch.object(kernel_tuning.run, "__defaults__", (by_tile({300: 1.0, 128: 4.0, 256: 2.0}),)):
        code, out, err = tune("--json", f"--output_dir={tmp_path}")
    assert code == 0, err
    assert json.loads(out) | {"date": ""} == json.loads((tmp_path / "cpu.json").read_text()) | {"date": ""}
    ((_, entry),) = json.loads(out)["block_sizes"]["decode_attention.mosaic_tpu"].items()
    assert entry["sizes"] is None and entry["seconds"] == 1.0


@pytest.mark.tpu_compile
def test_compilers_say_which_candidates_fit(tmp_path, monkeypatch):
    shape = DecodeShape(K=16, S=8192, H=256, dtype="bfloat16")
    sizes = lambda slots: {"heads": 16, "slots": slots, "splits": 1}
    monkeypatch.setattr(kernel_tuning, "candidates", lambda choice: [choice.default, sizes(128), sizes(8192)])
    monkeypatch.setattr(program, "SHAPES", (shape,))
    for name, value in tpu_compiler.LIBTPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    code, out, err = tune("--compile_only", "--kernels=dense", "--generations=v5e", f"--output_dir={tmp_path}")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "block_size_candidates.json").read_text())["generations"]["v5e"]
    heuristic, small, large = row["candidates"]
    assert heuristic["sizes"]["slots"] <= 256 and heuristic["problem"] is None and heuristic["temporary_bytes"] >= 0
    assert small["sizes"] == sizes(128) and small["problem"] is None
    # 16 heads of 8,192 slots of 2 x 256 channels are 128 MB.
    assert large["sizes"] == sizes(8192) and large["problem"] == "does not fit VMEM"
    assert all(trial["seconds"] is None for trial in row["candidates"])
    assert "2 of 3" in out and "does not fit VMEM: heads=16 slots=8192 splits=1" in out and " us" not in out


def test_tuning_needs_an_accelerator():
    code, _, err = tune()
    assert code == 2
    assert err == "error: running kernels needs a GPU or a TPU, found cpu only; --compile_only needs neither.\n"
    code, _, err = tune("--keep=0.5")
    assert code == 2 and "--keep means nothing to this program" in err
