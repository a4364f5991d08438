"""The stages of a first answer, on a tiny model."""

import functools
import re

import jax
import pytest

from experiments import first_answer as program
from tests.experiments import in_process, tiny_checkpoint

run = functools.partial(in_process.call, program)


def test_every_stage_has_a_line_and_the_second_answer_compiles_nothing(tmp_path):
    checkpoint, kept = tiny_checkpoint.write(tmp_path / "tiny"), jax.config.jax_compilation_cache_dir
    code, out, err = run(f"--model={checkpoint}", "--methods=keydiff", "--keep=0.5", "--context=80", "--cold")
    assert code == 0, err
    rows = re.findall(r"^(import|load|read|first answer|second answer) +([\d.]+) +([\d.]+) +[\d.]+ +(\d+)$", out, re.M)
    assert [row[0] for row in rows] == ["import", "load", "read", "first answer", "second answer"]
    so_far = [float(row[2]) for row in rows]
    assert so_far == sorted(so_far) and rows[-1][3] == "0"
    tokens, held = map(int, re.search(r"keydiff: (\d+) of (\d+) tokens kept", out).groups())
    assert tokens == held // 2 and out.count("\n> ") == 2
    assert jax.config.jax_compilation_cache_dir == kept


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--context=0", "--context must be at least 1 token, got 0."),
        ("--methods=full,snapkv", "--methods must be one here, got full, snapkv."),
    ],
)
def test_bad_input_is_one_line(flag, message):
    assert run(flag) == (2, "", f"error: {message}\n")
