"""The folder of a training: what is resumed from, what is kept, and what is refused."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training_folder import TrainingFolder

ABOUT = {"configuration": "Training.steps = 4\nTraining.seed = 0", "model": "tiny"}


def state(size=3, dtype=jnp.float32):
    return {"trained": {"x": jnp.arange(size, dtype=dtype)}, "optimizer": (jnp.int32(7), ())}


def log(folder, steps):
    """The lines of so many steps, the first of which is before training."""
    folder.log({"step": 0, "validation": 4.0})
    for step in range(1, steps + 1):
        folder.log({"step": step, "loss": 1.0, "validation": 2.0})


def opened(path, resume=False, about=ABOUT, keep=1):
    return TrainingFolder(path, about, keep=keep, resume=resume)


def test_the_last_checkpoint_and_the_best_are_kept_and_lines_after_the_last_are_forgotten(tmp_path):
    with opened(tmp_path) as folder:
        log(folder, 0)
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5], start=1):
            folder.log({"step": step, "loss": loss, "validation": loss})
            folder.save(step, state(step), loss)
        folder.log({"step": 5, "loss": 9.0})
        assert folder.best_step() == 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}
    with opened(tmp_path, resume=True) as folder:
        assert folder.step == 4 and [row["step"] for row in folder.rows] == [0, 1, 2, 3, 4]
        loaded = folder.load(2, state(2))
        np.testing.assert_array_equal(loaded["trained"]["x"], [0.0, 1.0])
        assert int(loaded["optimizer"][0]) == 7
    with opened(tmp_path) as folder:  # afresh
        assert folder.step == 0 and folder.rows == []
    assert not any((tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_of_other_shapes_is_refused_by_name(tmp_path):
    with opened(tmp_path) as folder:
        log(folder, 1)
        folder.save(1, state(3), 1.0)
    with opened(tmp_path, resume=True) as folder:
        with pytest.raises(ValueError, match=r"checkpoints/1 cannot be resumed from: trained/x is float32\[3\] there"):
            folder.load(1, state(4))
        with pytest.raises(ValueError, match="trained/x is float32.* there and bfloat16"):
            folder.load(1, state(3, jnp.bfloat16))
    for path in (tmp_path / "checkpoints" / "1" / "default").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with opened(tmp_path, resume=True) as folder, pytest.raises(ValueError, match="checkpoints/1 cannot be resumed"):
        folder.load(1, state(3))


def test_another_training_is_not_taken_up(tmp_path):
    with pytest.raises(ValueError, match="holds no training; leave --resume out"):
        opened(tmp_path, resume=True)
    with opened(tmp_path):
        pass
    other = ABOUT | {"configuration": "Training.steps = 5\nTraining.seed = 0"}
    with pytest.raises(ValueError, match="of another configuration: -Training.steps = 4; \\+Training.steps = 5\\."):
        opened(tmp_path, resume=True, about=other)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ValueError, match="training.json is damaged"):
        opened(tmp_path, resume=True)


def test_what_may_change_is_asked_with_what_it_was_and_the_steps_that_are_done(tmp_path):
    asked = []

    def may(was, done):
        asked.append((was, done))
        if was == 8:
            raise ValueError("not these")

    again = lambda steps: TrainingFolder(
        tmp_path, ABOUT | {"steps": steps}, keep=1, resume=True, may_change={"steps": may}
    )
    with opened(tmp_path, about=ABOUT | {"steps": 4}) as folder:
        log(folder, 3)
        folder.save(3, state(), 1.0)
    with again(4):
        assert asked == []
    with again(8) as folder:
        assert asked == [(4, 3)] and folder.step == 3
    with pytest.raises(ValueError, match="not these"):
        again(9)
    with again(8):  # what was refused changed nothing
        assert asked == [(4, 3), (8, 3)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("os error: No space left")])
def test_a_full_disk_is_named_and_what_is_complete_stays(error, tmp_path, monkeypatch):
    folder = opened(tmp_path)
    log(folder, 1)
    folder.save(1, state(), 1.0)
    folder.wait()

    def full(*given, **how):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(folder._manager, "save", full)
        with pytest.raises(OSError, match="no space left; the checkpoints that are complete are kept: make room"):
            folder.save(2, state(), 0.5)
    folder.__exit__(OSError, None, None)
    with opened(tmp_path, resume=True) as folder:
        assert folder.step == 1
        np.testing.assert_array_equal(folder.load(1, state())["trained"]["x"], [0.0, 1.0, 2.0])
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, json.dumps(ABOUT | {"steps": None})[:-3]])
def test_settings_that_are_none_are_refused(text, tmp_path):
    with opened(tmp_path):
        pass
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(ValueError, match="--resume: .*training.json is damaged.*; pass another --output_dir, or --rep"):
        opened(tmp_path, resume=True)


@pytest.mark.parametrize("steps", [None, "4", [4], True])
def test_steps_of_another_kind_are_refused(steps, tmp_path):
    with opened(tmp_path, about=ABOUT | {"steps": steps}):
        pass
    with pytest.raises(ValueError) as error:
        TrainingFolder(tmp_path, ABOUT | {"steps": 4}, keep=1, resume=True, may_change={"steps": None})
    assert f"training.json is damaged (steps is {steps!r}, not of the kind of 4)" in str(error.value)


@pytest.mark.parametrize(
    "line, text, wanted",
    [
        (1, None, "line 1 is missing: the last checkpoint is of step 2"),
        (3, None, "line 3 is missing: the last checkpoint is of step 2"),
        (1, '{"step": 0, "valid', "line 1 is damaged: expected the metrics of step 0"),
        (2, "{}", "line 2 is damaged: expected the metrics of step 1"),
        (2, "[1]", "line 2 is damaged: expected the metrics of step 1"),
        (2, "[" * 100_000, "line 2 is damaged: expected the metrics of step 1"),
        (2, '{"step": 1, "loss": "low"}', "line 2 is damaged: expected the metrics of step 1"),
        (2, '{"step": 2, "loss": 1.0, "validation": 1.0}', "line 2 is damaged: expected the metrics of step 1"),
        (1, '{"step": 0}', "line 1 is damaged: step 0 has no validation"),
        (2, '{"step": 1}', "line 2 is damaged: step 1 has no loss"),
        (3, '{"step": 2, "loss": 1.0}', "line 3 is damaged: step 2 has no validation"),
    ],
)
def test_metrics_that_are_damaged_are_named_by_line_and_left_alone(line, text, wanted, tmp_path):
    with opened(tmp_path) as folder:
        log(folder, 2)
        folder.save(2, state(), 1.0)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[line - 1 :] = [] if text is None else [text, *lines[line:]]
    path.write_text("".join(f"{each}\n" for each in lines))
    before = path.read_bytes()
    for _ in range(2):  # the folder is let go
        with pytest.raises(ValueError) as error:
            opened(tmp_path, resume=True)
        assert f"--resume: {path}, {wanted}; pass another --output_dir" in str(error.value)
    assert path.read_bytes() == before
