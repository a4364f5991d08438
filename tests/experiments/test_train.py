"""The training program: what it leaves, what it survives, and what it refuses."""

import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import calibrations, measurements
from experiments import train as program
from experiments.methods import load_method
from models import load_model
from tests.experiments import in_process
from tests.quick_jit import quick_jit

ROOT = pathlib.Path(__file__).parents[2]
RUNS = sorted(path.stem.removeprefix("train_") for path in (ROOT / "configs" / "runs").glob("train_*.gin"))
SMALL = (
    "TrainingText.context = 48",
    "TrainingText.follow = 16",
    "TrainingText.questions = 0.0",
    "Training.validate_every = 2",
    "Training.validation_batches = 1",
    "Training.rows = 2",
)
OF = {
    "matryoshka": ["train_matryoshka.rates = (0.5,)"],
    "locret": ["train_locret.hidden = 8"],
    "prefix": ["train_prefix.slots = 4"],
    "lococo": ["train_lococo.budget = 24", "train_lococo.merged = 4", "train_lococo.chunk = 24"],
    "attention_gate": [f"train_attention_gate.{x}" for x in ("recent = 4", "channels = 4")],
    "duoattention": ["train_duoattention.sinks = 2", "train_duoattention.recent = 8"],
}

train = functools.partial(in_process.call, program)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"the {number} of {number * number}" for number in range(400)))
    return path


def flags(name, checkpoint, text, folder, *more, steps=4):
    bindings = [*SMALL, *OF.get(name, []), f"TrainingText.file = '{text}'"]
    return [
        f"--gin_file={ROOT}/configs/runs/train_{name}.gin",
        *(f"--gin_bindings={binding}" for binding in bindings),
        f"--model={checkpoint}",
        f"--output_dir={folder}",
        f"--steps={steps}",
        *more,
    ]


def rows(folder):
    """The metrics without what a clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name != "seconds"} for row in lines]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("cskv", "locret") else pytest.mark.slow) for name in RUNS]
)
def test_a_recipe_trains_its_part_alone_and_its_method_runs_with_the_result(
    name, checkpoint, model, text, tmp_path, monkeypatch
):
    trainers = []

    class Trainer(program.Trainer):
        jit = staticmethod(quick_jit)

        def __init__(self, *given):
            super().__init__(*given)
            trainers.append(self)

        def start(self):
            state = super().start()
            self.first = jax.tree.map(np.array, (state.trained, state.constants))
            return state

    monkeypatch.setattr(program, "Trainer", Trainer)
    if name == "matryoshka":  # its search compiles for longer than all else, and is tested with the calibrations
        ranks = np.full((1, 2, 2), 16.0, np.float32)
        searched = {"rates": np.float32([0.5]), "key_ranks": ranks, "value_ranks": ranks}
        monkeypatch.setattr(measurements, "search_ranks", lambda *given, **how: searched)
    folder = tmp_path / "made"
    before = calibrations.fingerprint(model)
    dtype = "bfloat16" if name in ("locret", "duoattention") else "float32"
    code, out, err = train(*flags(name, checkpoint, text, folder, f"--gin_bindings=Training.dtype = '{dtype}'"))
    assert code == 0, err
    (trainer,) = trainers
    assert trainer._model.params.embed.dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(trainer.first[0])} == {np.dtype("float32")}
    assert trainer.compiled._cache_size() == 1  # one program for all steps
    assert calibrations.fingerprint(trainer._model) == before
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4] and {"loss", "gradient"} <= found[1].keys()
    assert [row["step"] for row in found if "validation" in row] == [0, 2, 4]
    assert all(row.get("orthogonality", 0.0) < 1e-5 for row in found)
    assert (folder / "curves.png").stat().st_size > 1000
    method = trainer._training.recipe.method
    data = calibrations.load(folder / "trained", method, model)
    untrained = trainer._training.recipe.finish(trainer._model, *trainer.first)
    moved = {key for key in data if not np.array_equal(untrained[key], data[key])}
    assert moved == {key for key in data if key not in ("rates", "key_ranks", "value_ranks")}
    load_method(method, budget=0.5, calibrate=lambda recipe, path: data)
    steps = re.search(r"best [\d.]+ at step (\d+)", out)[1]
    assert json.loads((folder / "trained" / "calibration.json").read_text())["settings"]["step"] == int(steps)


def test_killed_at_any_time_it_goes_on_to_the_same_numbers(checkpoint, text, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = lambda folder, *more: flags(
        "cskv", checkpoint, text, folder, "--gin_bindings=Training.validate_every = 4", *more, steps=24
    )
    assert train(*given(whole))[0] == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *given(cut)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    metrics = cut / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # As if the last line had been cut off, and a checkpoint had been under way.
    with open(metrics, "a") as file:
        file.write('{"step": 7')
    (cut / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()
    assert not (cut / "trained").exists()
    code, _, err = train(*given(cut), "--resume")
    assert code == 0, err
    assert rows(cut) == rows(whole)
    one, two = (calibrations.load(path / "trained", "cskv_trained", load_model(checkpoint)) for path in (whole, cut))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_more_steps_go_on_to_the_numbers_of_a_longer_training_where_the_schedule_permits(checkpoint, text, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    constant = [f"--gin_bindings=optimizer.{x}" for x in ("schedule = 'constant'", "warmup = 0.0")]
    given = lambda folder, steps, *more: flags("cskv", checkpoint, text, folder, *more, steps=steps)
    assert train(*given(whole, 8, *constant))[0] == 0
    assert train(*given(cut, 4, *constant))[0] == 0
    code, _, err = train(*given(cut, 8, *constant, "--resume"))
    assert code == 0 and "--resume: 8 steps instead of 4: the learning rate goes from 0.001 at step 4 to 0.001" in err
    assert rows(cut) == rows(whole)
    code, _, err = train(*given(cut, 6, *constant, "--resume"))
    assert code == 2 and "--steps: 8 steps are done already, got 6" in err
    falling = tmp_path / "falling"
    assert train(*given(falling, 4))[0] == 0  # as the config has it: a cosine, down to a tenth
    before = rows(falling)
    code, _, err = train(*given(falling, 8, "--resume"))
    assert code == 2 and "the learning rate is 0.0001 after 4 of 4 steps, and would jump to 0.00055 with 8" in err
    assert "resume with --steps=4, or start anew with --replace" in err and rows(falling) == before
    code, _, err = train(*given(falling, 8, "--gin_bindings=Training.seed = 1", "--resume"))
    assert code == 2 and "of another configuration: -Training.seed = 0; +Training.seed = 1." in err


def test_a_model_that_gives_no_numbers_is_refused_before_the_first_step(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(program.Trainer, "validation_loss", lambda self, state: float("nan"))
    code, _, err = train(*flags("cskv", checkpoint, text, tmp_path / "made"))
    assert code == 2 and "the loss before training is nan: the model's weights or activations are not finite" in err
    assert rows(tmp_path / "made") == []


def test_another_text_under_the_same_name_is_not_gone_on_with(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(program.Trainer, "jit", staticmethod(quick_jit))
    own, folder = tmp_path / "text.txt", tmp_path / "made"
    own.write_bytes(text.read_bytes())
    given = flags("cskv", checkpoint, own, folder, steps=2)
    assert train(*given)[0] == 0
    before = rows(folder)
    own.write_text(text.read_text().replace("the 7 of 49", "the 8 of 49"))
    code, _, err = train(*given, "--resume")
    assert code == 2 and f"--resume: {folder} is of another text: -{own}, fingerprint " in err
    assert rows(folder) == before
    own.write_bytes(text.read_bytes())
    (folder / "metrics.jsonl").unlink()
    code, _, err = train(*given, "--resume")
    assert code == 2 and "metrics.jsonl, line 1 is missing: the last checkpoint is of step 2" in err
    code, _, err = train(*given, "--resume", "--replace")
    assert (code, err) == (2, "error: --resume goes on with what --replace would discard; pass one of them.\n")


def test_a_binding_of_another_recipe_is_refused(checkpoint, text, tmp_path):
    more = "--gin_bindings=train_locret.hidden = 8"
    code, _, err = train(*flags("cskv", checkpoint, text, tmp_path / "made", more))
    assert code == 2 and "--gin_bindings: nothing here uses train_locret" in err


# What reads a cache, and what reads tokens.
@pytest.mark.parametrize("name", ["duoattention", pytest.param("locret", marks=pytest.mark.slow)])
def test_a_mesh_of_devices_trains_to_the_same_numbers(name, checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(program.Trainer, "jit", staticmethod(quick_jit))
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert train(*flags(name, checkpoint, text, alone, steps=2))[0] == 0
    mesh = "--gin_bindings=Training.mesh = 'data:2,seq:2,model:2'"
    code, _, err = train(*flags(name, checkpoint, text, spread, mesh, steps=2))
    assert code == 0, err
    for one, two in zip(rows(alone), rows(spread), strict=True):
        assert one == pytest.approx(two, rel=1e-4)  # float32, summed in another order


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(checkpoint, text, tmp_path):
    folder = tmp_path / "made"
    code, _, err = train(*flags("cskv", checkpoint, text, folder, "--gin_bindings=Training.mesh = 'data:3'"))
    assert code == 2 and "3 places, but there are 8 devices" in err and not folder.exists()
