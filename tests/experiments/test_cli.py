"""How every program starts and ends: the flags it lists, the errors it names, Ctrl-C."""

import importlib
import pathlib
import subprocess
import sys
import textwrap

import pytest
from absl import flags

from tests.experiments import in_process

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "cli.start(run)" in path.read_text(encoding="utf-8")
)


def test_all_programs_are_found():
    assert {"evaluate", "search", "calibrate", "train", "convert", "plan", "bench_decode"} <= set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_refuses_the_flags_that_its_help_does_not_list_and_no_others(name, monkeypatch):
    program = importlib.import_module(f"experiments.{name}")
    listed = flags.FLAGS.module_help(f"experiments.{name}")
    shared = [flag.name for flag in flags.FLAGS.get_key_flags_for_module("experiments.cli")]
    assert "output_dir" in shared and "keep" in shared
    monkeypatch.setattr(program, "run", lambda: print("runs"))
    program.run.__module__ = f"experiments.{name}"
    values = {"keep": "0.5", "budget": "8", "read": "0.5", "context": "64", "batch": "2", "dtype": "float32"}
    values |= {"examples": "2", "task_seed": "2", "following": "8", "ratios": "0.5"}
    values |= {"gin_file": f"{ROOT}/configs/runs/quickstart.gin"}
    accepted = 0
    for flag in shared:
        given = f"--{flag}" if flag in ("json", "overwrite") else f"--{flag}={values.get(flag, 'x')}"
        code, out, err = in_process.call(program, given)
        if f"--{flag}:" in listed or f"--[no]{flag}:" in listed:
            assert (code, out, err) == (0, "runs\n", "")
            accepted += 1
        else:
            assert (code, err) == (2, f"error: --{flag} means nothing to this program.\n")
    assert accepted < len(shared) and (accepted or name == "figures")


def test_a_flag_of_another_program_is_refused():
    program, other = (importlib.import_module(f"experiments.{name}") for name in ("calibrate", "search"))
    assert other and in_process.call(program, "--target_ratio=4")[::2] == (
        2,
        "error: --target_ratio means nothing to this program.\n",
    )


def _program(monkeypatch, error):
    program = importlib.import_module("experiments.evaluate")

    def run():
        raise error

    run.__module__ = program.__name__
    monkeypatch.setattr(program, "run", run)
    return program


@pytest.mark.parametrize(
    "path, given, wanted",
    [
        ("/proc/x", ["--output_dir=/proc/x"], "--output_dir: /proc/x: No such file or directory."),
        ("/proc/x/a/b", ["--output_dir=/proc/x"], "--output_dir: /proc/x/a/b: No such file or directory."),
        ("t.jsonl", ["--tasks=t.jsonl", "--output_dir=t"], "--tasks: t.jsonl: No such file or directory."),
        ("t", ["--gin_bindings=Settings.tasks = 't'"], "Settings.tasks: t: No such file or directory."),
        ("elsewhere", ["--tasks=t.jsonl"], "elsewhere: No such file or directory."),
    ],
)
def test_a_missing_file_is_named_with_the_flag_that_named_it(path, given, wanted, monkeypatch):
    error = FileNotFoundError(2, "No such file or directory", path)
    assert in_process.call(_program(monkeypatch, error), *given)[::2] == (2, f"error: {wanted}\n")


def test_an_interrupt_is_one_line(monkeypatch):
    code, _, err = in_process.call(_program(monkeypatch, KeyboardInterrupt()))
    assert code == 130 and err == "\ninterrupted.\n"


def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = _program(monkeypatch, ValueError("ran"))
    assert in_process.call(program, "--gin_file=configs/runs/quickstart.gin")[2] == "error: ran\n"
    missing = in_process.call(program, "--gin_file=configs/runs/quickstarts.gin")[2]
    assert missing == "error: --gin_file: no such file: configs/runs/quickstarts.gin.\n"
    (tmp_path / "configs" / "runs").mkdir(parents=True)
    (tmp_path / "configs" / "runs" / "quickstart.gin").touch()
    assert in_process.call(program, "--gin_file=configs/runs/quickstart.gin")[2] == "error: ran\n"


@pytest.mark.parametrize("when", ["numpy", "jax", "experiments.cli"])
def test_an_interrupt_during_imports_is_one_line(when):
    source = f"""
        import os, runpy, signal, sys
        class Interrupt:
            def find_spec(self, name, *rest):
                if name == {when!r}:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupt())
        sys.argv[:] = ["-m"]  # as it is while `python -m` looks for the program
        runpy.run_module("experiments.evaluate", run_name="__main__")
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "\ninterrupted.\n")


@pytest.mark.parametrize(
    "given, wanted",
    [
        (["--gin_bindings=Settings.length = [1"], "--gin_bindings: 'Settings.length = [1': a bracket or a string"),
        (["--gin_bindings=Settings.lenght = 3"], "a parameter named 'lenght'. Did you mean 'length'?"),
        (["--gin_bindings=Setings.length = 3"], "No configurable matching 'Setings'. Did you mean 'Settings'?"),
        (["--gin_bindings=Settings.length = %size"], "Settings: %size is used, and nothing binds size."),
        ([f"--gin_bindings=Settings.seed = {10**27}"], "Settings.seed must fit into 64 bits, got 1000000000000"),
        (["--gin_bindings=Settings.tasks = 'vt,needels'"], "--tasks: unknown task 'needels'"),
        (["--tasks="], "--tasks must name tasks or files, got an empty name."),
    ],
)
def test_settings_that_are_none_are_one_line(given, wanted):
    program = importlib.import_module("experiments.evaluate")
    code, out, err = in_process.call(program, *given)
    assert (code, out) == (2, "") and err.startswith("error: ") and wanted in err and len(err.splitlines()) == 1


def test_settings_of_synthetic_tasks_are_said_to_be_idle_where_others_run(capsys):
    program = importlib.import_module("experiments.evaluate")
    given = ["--tasks=nowhere.jsonl", "--model=nowhere", "--gin_bindings=Settings.length = 64"]
    _, _, err = in_process.call(program, *given)
    assert err.splitlines()[0] == "note: Settings.length: of generated tasks, and those of nowhere.jsonl run."
    assert "note: " not in in_process.call(program, *given[1:])[2]


def test_a_folder_that_cannot_be_made_is_named_with_its_flag_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    for name in ("convert", "calibrate"):
        more = ["--method=million"] if name == "calibrate" else []
        program = importlib.import_module(f"experiments.{name}")
        folder = tmp_path / "file" / "x"
        code, _, err = in_process.call(program, "--model=nowhere", f"--output_dir={folder}", *more)
        assert (code, err) == (2, f"error: --output_dir: {folder}: Not a directory.\n")


def test_a_program_that_takes_one_number_refuses_several():
    program = importlib.import_module("experiments.plan")
    code, _, err = in_process.call(program, "--context=64,128")
    assert (code, err) == (2, "error: --context takes one number here, got 64,128.\n")
