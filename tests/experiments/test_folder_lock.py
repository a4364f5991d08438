"""One process at a time in a folder."""

import errno
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from experiments import convert
from experiments.folder_lock import FILE, FolderLock
from experiments.results import ResultsFile
from experiments.training_folder import TrainingFolder
from tests.experiments import in_process

ROOT = pathlib.Path(__file__).parents[2]


def test_the_second_is_refused_with_the_firsts_id_until_that_is_killed(tmp_path):
    program = (
        "from experiments.folder_lock import *; "
        f"x = FolderLock(pathlib.Path({str(tmp_path)!r})); print(1); input()"
    )
    how = dict(cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", program], **how) as first:
        assert first.stdout.readline() == "1\n"
        for _ in range(2):  # the refusal leaves the lock as it is
            with pytest.raises(ValueError, match=f"process {first.pid} writes to {re.escape(str(tmp_path))};"):
                FolderLock(tmp_path)
        first.kill()
    with FolderLock(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()} writes"):
            FolderLock(tmp_path)
    FolderLock(tmp_path).close()


def test_results_and_trainings_are_locked_and_let_go_also_where_they_are_refused(tmp_path):
    results, training = tmp_path / "results", tmp_path / "training"
    train = lambda resume=False, about=1: TrainingFolder(training, {"x": about}, keep=1, resume=resume)
    with ResultsFile(results, {"seed": 0}), train():
        results_again = (lambda how=how: ResultsFile(results, {"seed": 0}, **how) for how in ({}, {"overwrite": True}))
        for again in (*results_again, train):
            with pytest.raises(ValueError, match=f"process {os.getpid()} writes"):
                again()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        ResultsFile(results, {"seed": 1})
    with pytest.raises(ValueError, match="is of another x"):
        train(resume=True, about=2)
    for folder in (results, training):
        FolderLock(folder).close()


def test_a_lock_that_holds_no_process_id_is_named_all_the_same(tmp_path):
    with FolderLock(tmp_path):
        (tmp_path / FILE).write_bytes(b"\xff\xfe\xe9")
        with pytest.raises(ValueError, match="--output_dir: another process writes to"):
            FolderLock(tmp_path)


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    program = f"""
        import pathlib, resource, signal
        from experiments.folder_lock import FolderLock
        from experiments.pictures import _save
        from matplotlib.figure import Figure
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        folder = pathlib.Path({str(tmp_path)!r})
        for write in (lambda: FolderLock(folder), lambda: _save(Figure(), folder / "x.png")):
            try:
                write()
            except OSError as error:
                print(error.errno, error.filename)
    """
    how = dict(cwd=ROOT, capture_output=True, text=True)
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], **how)
    assert ran.stdout.splitlines() == [f"{errno.EFBIG} {tmp_path / name}" for name in (FILE, "x.png")], ran.stderr
    FolderLock(tmp_path).close()


def test_a_program_does_not_replace_a_folder_that_another_process_has_just_locked(tmp_path):
    with FolderLock(tmp_path):
        code, _, err = in_process.call(convert, "--model=nowhere", f"--output_dir={tmp_path}")
        assert code == 2 and f"process {os.getpid()} writes to {tmp_path}" in err
