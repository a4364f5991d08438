"""Searching compositions: their configs, the budget for a size, and the program on a tiny model."""

import json

import numpy as np
import pytest

from experiments import compositions, evaluator, search
from experiments.methods import load_method
from tests.experiments import in_process, tiny_checkpoint
from tests.quick_jit import quick_jit


def test_a_composition_is_the_chain_of_its_parts():
    text = compositions.compose_configs(["adakv_snapkv", "int4"])
    assert "compose.transforms = [@adakv_snapkv(), @kivi()]" in text
    assert "adakv_snapkv.page = 32" in text  # a page holds whole groups
    method = load_method("any", budget=0.5, text=text)
    assert method.transform.schedule.budget == 0.5 and "numbers" in method.transform.schedule.order.loses


@pytest.mark.parametrize(
    "names, why",
    [
        (["snapkv_int4", "int8"], "is one"),
        (["h2o_chunked", "int8"], "in chunks"),
        (["rotatekv", "million"], "one calibration"),
        (["int4", "int8"], "one transform twice"),
    ],
)
def test_what_cannot_stand_in_one_config_is_refused(names, why):
    with pytest.raises(ValueError, match=why):
        compositions.compose_configs(names)


def test_the_budget_for_a_ratio_is_the_largest_that_reaches_it():
    size = lambda keep: 1000 + 32 * int(keep * 1000 / 4)  # in steps
    keep = compositions.keep_for_ratio(size, 9000, 3.0)
    assert size(keep) <= 3000 < size(keep + 0.012)
    assert compositions.keep_for_ratio(size, 9000, 100.0) is None
    assert compositions.keep_for_ratio(size, 9000, 1.0) == 0.99

    def windowed(keep):
        if keep < 0.07:
            raise ValueError("budget must hold the window")
        return size(keep)

    assert compositions.keep_for_ratio(windowed, 9000, 3.0) == pytest.approx(keep, abs=0.012)


@pytest.mark.float8
def test_search_writes_configs_that_keep_their_promise(tmp_path):
    model = tiny_checkpoint.write(tmp_path / "model")
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, 250, size=n).tolist()
    tasks = tmp_path / "tasks.jsonl"
    lines = [{"task": "a", "context_ids": draw(96), "question_ids": draw(2), "answer_ids": draw(3)} for _ in range(2)]
    tasks.write_text("\n".join(map(json.dumps, lines)))
    flags = [f"--model={model}", "--target_ratio=1.7", f"--tasks={tasks}", f"--output_dir={tmp_path / 'out'}"]
    code, out, err = in_process.call(search, *flags, "--examples=2", "--select=keydiff,knorm", "--store=fp8")
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]
    tried = {name: entry for name, entry in summary.items() if name != "full"}
    assert set(tried) == {"keydiff_fp8", "knorm_fp8", "keydiff", "knorm", "fp8"}
    full = summary["full"]["mean"]["cache_bytes"]
    for name, entry in tried.items():
        times = full / entry["mean"]["cache_bytes"]
        # fp8 alone is more than 1.7 times smaller than 16 bits: nothing needs to be dropped.
        assert times == pytest.approx(1.7, rel=0.05) if name in ("keydiff", "knorm") else times > 1.85
    # Of five, three went on to a second example.
    assert sorted(entry["examples"] for entry in tried.values()) == [1, 1, 2, 2, 2]
    finalists = [name for name, entry in tried.items() if entry["examples"] == 2]
    winner = min(finalists, key=lambda name: tried[name]["mean"]["kl"])
    assert f"The winner at 1.7 times fewer bytes: {winner}," in out
    text = (tmp_path / "out" / "front" / f"{winner}.gin").read_text()
    assert "%budget" not in text and load_method(winner, budget=1, text=text).name == winner


@pytest.mark.slow
def test_a_search_on_a_mesh_finds_what_one_device_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator.Evaluator, "jit", staticmethod(quick_jit))
    model = tiny_checkpoint.write(tmp_path / "model")
    draw = lambda n: np.random.default_rng(n).integers(3, 250, size=n).tolist()
    tasks = tmp_path / "tasks.jsonl"
    lines = [{"task": "a", "context_ids": draw(96), "question_ids": draw(2), "answer_ids": draw(3)}] * 2
    tasks.write_text("\n".join(json.dumps(line | {"id": i}) for i, line in enumerate(lines)))
    found = {}
    for name, more in {"one": [], "mesh": ["--mesh=data:2,seq:2,model:2", "--batch=2"]}.items():
        flags = [f"--model={model}", "--target_ratio=1.7", f"--tasks={tasks}", f"--output_dir={tmp_path / name}"]
        code, _, err = in_process.call(search, *flags, *more, "--examples=2", "--select=keydiff", "--store=int8")
        assert code == 0, err
        summary = json.loads((tmp_path / name / "summary.json").read_text())["methods"]
        found[name] = {method: entry["mean"]["nll"] for method, entry in summary.items()}
    assert {"full", "keydiff"} <= found["mesh"].keys() <= found["one"].keys()  # a mesh may round slots up
    assert found["mesh"] == pytest.approx({name: found["one"][name] for name in found["mesh"]}, abs=1e-3)


def test_search_refuses_what_it_cannot_do(tmp_path):
    call = lambda *flags: in_process.call(search, f"--output_dir={tmp_path}", *flags)
    for flags, name in (
        (["--target_ratio=1"], "--target_ratio"),
        (["--target_ratio=nan"], "--target_ratio must be above 1 and finite, got nan."),
        (["--target_ratio=inf"], "--target_ratio must be above 1 and finite, got inf."),
        (["--examples=0"], "--examples"),
        (["--install=int4"], "--install"),
        (["--install=a b"], "--install"),
        (["--keep=0.5"], "--keep"),
        (["--select=KeyDiff"], "--select: unknown method 'KeyDiff'; did you mean 'keydiff'?"),
        (["--store=int3"], "--store: unknown method 'int3'"),
    ):
        code, _, err = call(*flags)
        assert code == 2 and name in err and len(err.splitlines()) == 1


def test_search_refuses_tasks_without_answers_before_anything_runs(tmp_path, monkeypatch):
    model, tasks = tiny_checkpoint.write(tmp_path / "model"), tmp_path / "tasks.jsonl"
    lines = [{"task": "a", "context_ids": [3, 4, 5]}, {"task": "a", "context_ids": [3, 4, 5], "answer_ids": [6]}]
    tasks.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(search, "candidates", None)
    code, _, err = in_process.call(search, f"--model={model}", f"--tasks={tasks}", f"--output_dir={tmp_path / 'out'}")
    assert (code, err) == (
        2,
        "error: --tasks: example 0 (a) has no answer, whose predictions a search compares.\n",
    )
