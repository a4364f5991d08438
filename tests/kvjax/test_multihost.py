"""Two real processes, joined by `jax.distributed`, do what one does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.experiments import tiny_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.kvjax.two_processes", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def tokens_of(process: subprocess.Popen) -> list[list[int]]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("method", ["snapkv_int4"])
def test_two_processes_draw_the_tokens_of_one(tmp_path, method):
    model = tiny_checkpoint.write(tmp_path / "model")
    port = free_port()
    two = [start(model, tmp_path / "two", method, process, port) for process in range(2)]
    one = start(model, tmp_path / "one", method)
    expected, restored = tokens_of(one)
    assert len(set(map(tuple, expected))) == 2  # rows differ, so tokens say something
    assert restored == expected
    for process in two:
        assert tokens_of(process) == [expected, expected]
    assert (tmp_path / "two" / "run" / "kvjax_run.json").is_file()
