"""The kernel benchmark: what its tables say, with the compilers alone and with a device. No time is asserted."""

import dataclasses
import functools
import importlib.util
import json
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import kvjax
from experiments import bench_kernels as program
from experiments import kernel_flags, kernel_timing, tpu_compiler
from experiments.kernel_cases import CASES, KernelCase
from pallas_kernels.shapes import LLAMA_8B
from tests.experiments import in_process

bench = functools.partial(in_process.call, program)


@pytest.fixture(autouse=True)
def libtpu_settings(monkeypatch):
    for name, value in tpu_compiler.LIBTPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.tpu_compile
def test_compiled_kernels_read_their_arguments(tmp_path):
    which = ["--kernels=dense,fp8,pack keys", "--contexts=256", "--batches=2", "--generations=v5e,v6e"]
    code, out, err = bench("--compile_only", *which, f"--output_dir={tmp_path}")
    assert code == 0, err
    assert "compiling dense, 2 x 256, for v6e" in err
    report = json.loads((tmp_path / "kernel_footprints.json").read_text())
    rows = {row["name"]: row for row in report["footprints"]}
    assert list(rows) == ["dense", "fp8", "pack keys"]
    slots = 2 * 8 * 256
    shape = dataclasses.replace(LLAMA_8B, B=2, S=256)
    for case in CASES:
        if case.name in rows:  # positions of single queries are padded to a tile
            read = rows[case.name]["argument_bytes"]
            assert read == pytest.approx(kvjax.nbytes(case.abstract(shape)), rel=0.01)
    assert rows["dense"]["argument_bytes"] == pytest.approx(slots * (2 * 128 * 2 + 4), rel=0.02)
    line = next(line for line in out.splitlines() if line.startswith("fp8"))
    bound = rows["fp8"]["argument_bytes"] / 819e9
    ratio = rows["fp8"]["argument_bytes"] / rows["dense"]["argument_bytes"]
    assert line.split()[5:8] == [f"{ratio:.3f}", f"{bound * 1e6:.1f}", "us"]
    assert set(rows["fp8"]["compile_seconds"]) == {"v5e", "v6e"}
    assert "Wrote" in out and "optimal" not in out


def test_kernels_that_a_tpu_does_not_take_or_hold_are_rows_too():
    def refuse(device, *_):
        if device == "v5e:2x2":
            raise NotImplementedError("op: mosaic_tpu takes less")
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GB of 16 GB")

    generations = tpu_compiler.GENERATIONS[:2]
    with (
        mock.patch.object(program, "compile_for", refuse),
        mock.patch.object(program, "compile_only_device", lambda topology: topology),
    ):
        (row,) = program.footprints(CASES[:1], [dataclasses.replace(LLAMA_8B, S=64)], generations)
    assert row.argument_bytes is None
    assert row.refused == {"v5e": "op: mosaic_tpu takes less", "v6e": "does not fit one chip"}
    assert program.footprint_line(row, CASES[0], None, generations).endswith("mosaic_tpu takes less")
    compiled = dict(argument_bytes=819 * 10**6, temporary_bytes={"v5e": 1}, compile_seconds={"v5e": 1.0})
    held = dataclasses.replace(row, **compiled)
    assert "no room" in program.footprint_line(held, CASES[0], None, generations)


def test_a_missing_compiler_says_how_to_install_it():
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        code, _, err = bench("--compile_only")
    assert code == 2 and "pip install 'jax[tpu]'" in err


def test_timing_needs_an_accelerator():
    code, _, err = bench()
    assert code == 2
    assert err == "error: running kernels needs a GPU or a TPU, found cpu only; --compile_only needs neither.\n"


def test_gpu_kernels_are_timed_on_hopper_alone():
    gpu = lambda **about: types.SimpleNamespace(platform="gpu", **about)
    assert kernel_flags.implementation(gpu(device_kind="NVIDIA H100", compute_capability="9.0")) == "mosaic_gpu"
    with pytest.raises(ValueError, match="for Hopper, compute capability 9.0, found NVIDIA A100 of 8.0"):
        kernel_flags.implementation(gpu(device_kind="NVIDIA A100", compute_capability="8.0"))


@pytest.fixture
def on_cpu(monkeypatch):
    """The reference in the place of the kernel, timed for as long as it takes once."""
    monkeypatch.setattr(kernel_flags, "implementation", lambda device: "xla")
    monkeypatch.setattr(kernel_timing, "_LONG_ENOUGH", 0.0)
    monkeypatch.setattr(kernel_timing, "copy_gigabytes_per_second", lambda: 10.0)


def test_a_timed_run_writes_what_it_printed(on_cpu, tmp_path):
    which = ["--kernels=dense,int4", "--contexts=64", "--batches=1", "--seed=3"]
    code, out, err = bench(*which, f"--output_dir={tmp_path}")
    assert code == 0, err
    (path,) = tmp_path.glob("kernels_cpu_*.json")
    report = json.loads(path.read_text())
    assert report["seed"] == 3 and report["device"] == "cpu" and report["versions"]["jax"] == jax.__version__
    assert report["date"] and report["implementation"] == "xla"
    dense, int4 = report["timings"]
    for row in (dense, int4):
        assert row["error"] == 0.0 and not row["wrong"] and row["seconds"] > 0 and row["xla_seconds"] > 0
    assert dense["jax_seconds"] > 0 and int4["jax_seconds"] is None
    assert "block sizes not tuned" in out and report["tuned"] is False
    line = next(line for line in out.splitlines() if line.startswith("int4"))
    assert line.split()[5] == f"{int4['read_bytes'] / int4['seconds'] / 1e9:.0f}"
    assert f"{int4['seconds'] / dense['seconds']:.3f}" in line.split()


def test_a_kernel_that_differs_from_its_reference_ends_the_run_badly(on_cpu, tmp_path, monkeypatch):
    op = lambda x, implementation: x if implementation == "xla" else 1.05 * x
    case = KernelCase("fp8", op, lambda shape, key: (jax.random.normal(key, (4,)),))
    row = kernel_timing.time_kernel(case, LLAMA_8B, "mosaic_gpu", jax.random.key(0))
    assert row.wrong and row.error == pytest.approx(0.05, rel=1e-3)
    monkeypatch.setattr(program, "_timings", lambda *_: iter([row]))
    code, _, err = bench("--kernels=fp8", f"--output_dir={tmp_path}")
    assert code == 2 and "kernels that differ from their reference: fp8 1 x 32768." in err


def test_json_is_printed_instead_of_the_table(on_cpu, tmp_path, monkeypatch):
    row = kernel_timing.Timing("fp8", 1, 32768, read_bytes=100, seconds=1e-3, error=0.0)
    monkeypatch.setattr(program, "_timings", lambda *_: iter([row]))
    code, out, _ = bench("--kernels=fp8", "--json", f"--output_dir={tmp_path}")
    (path,) = tmp_path.glob("kernels_cpu_*.json")
    printed, written = json.loads(out), json.loads(path.read_text())
    assert code == 0 and printed | {"date": ""} == written | {"date": ""}
    assert printed["timings"] == [dataclasses.asdict(row)]


def test_differences_count_infinities_and_packed_words():
    inf = jnp.inf
    assert kernel_timing.difference((jnp.array([1.0, -inf]),), (jnp.array([1.0, -inf]),)) == (0.0, False)
    assert kernel_timing.difference(jnp.array([1.0, -9.0]), jnp.array([1.0, -inf]))[1]
    assert kernel_timing.difference(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 1.0]))[1]
    assert kernel_timing.difference(jnp.uint32([1, 2]), jnp.uint32([1, 3])) == (0.5, True)
    assert not kernel_timing.difference(jnp.array([1.0, 1.01]), jnp.array([1.0, 1.0]))[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_take_what_the_cases_draw(case):
    shape = dataclasses.replace(LLAMA_8B, B=2, S=4096)
    run = lambda implementation: jax.eval_shape(case.program(shape, implementation), *case.abstract(shape))
    assert run("mosaic_tpu") == run("xla")
    if case.name in ("dense", "int8", "int4", "int2", "ragged"):
        assert run("mosaic_gpu") == run("xla")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--kernels=dense,int3", "--kernels: unknown name 'int3'; did you mean '\\w+'. There are dense, fp8, int8, "),
        ("--contexts=100", "--contexts must be multiples of 32, got '100'"),
        ("--batches=0", "--batches must be whole numbers of at least 1, got '0'"),
        ("--generations=v4", "--generations: unknown name 'v4'; there are v5e, v6e, v5p, tpu7x"),
        ("--keep=0.5", "--keep means nothing to this program"),
    ],
)
def test_bad_flags_are_named(flag, message):
    code, _, err = bench("--compile_only", flag)
    assert code == 2
    assert re.search(message, err)
