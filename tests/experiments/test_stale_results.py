"""The evaluation started again after something changed under the same path, and what it refuses to score."""

import functools
import json

import numpy as np
import pytest
import safetensors.numpy

import kvjax
from experiments import evaluate as program
from experiments import methods
from tests.experiments import in_process, tiny_checkpoint

evaluate = functools.partial(in_process.call, program)


@pytest.fixture(scope="module")
def lines():
    rng = np.random.default_rng(1)
    ids = lambda n: rng.integers(3, 250, n).tolist()
    return [{"task": "a", "context_ids": ids(n), "question_ids": ids(2), "answer_ids": ids(3)} for n in (60, 40)]


@pytest.fixture(scope="module")
def finished(lines, tmp_path_factory):
    """A finished run: its model, its tasks, its configs, its folder."""
    root = tmp_path_factory.mktemp("run")
    tiny_checkpoint.write(root / "model")
    write(root, lines)
    code, _, err = evaluate(*flags(root))
    assert code == 0, err
    return root


def flags(root, *more):
    paths = {"model": root / "model", "tasks": root / "tasks.jsonl", "output_dir": root / "out"}
    return *(f"--{name}={path}" for name, path in paths.items()), "--methods=knorm", *more


def write(root, lines):
    (root / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def refused(root, wanted, *more):
    results = root / "out" / "results.jsonl"
    before = results.read_bytes()
    code, out, err = evaluate(*flags(root, *more))
    assert code == 2 and wanted in err and "--overwrite" in err and len(err.splitlines()) == 1, err
    assert results.read_bytes() == before and out == ""


def test_the_same_goes_on_and_the_lines_stay(finished):
    results = (finished / "out" / "results.jsonl").read_bytes()
    code, out, err = evaluate(*flags(finished))
    assert code == 0 and "knorm" in out, err
    assert (finished / "out" / "results.jsonl").read_bytes() == results


def test_changed_tasks_are_refused_and_new_ones_are_not(finished, lines):
    other = lines[1] | {"answer_ids": [9, *lines[1]["answer_ids"][1:]]}
    try:
        write(finished, [lines[0], other])
        refused(finished, "holds results of another example a/1 (content was ")
        write(finished, lines[:1])
        refused(finished, "holds results of example a/1, which the tasks no longer have")
        write(finished, [*lines, lines[0] | {"context_ids": lines[0]["context_ids"] + [5, 6, 7, 8, 9]}])
        refused(finished, "another example a/0 (padded prompt was 60 and is 64)")  # and with it the bytes of its cache
    finally:
        write(finished, lines)


def test_replaced_weights_are_refused(finished):
    path = finished / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    try:
        safetensors.numpy.save_file(tensors | {name: tensors[name] * np.float32(1.01)}, path)
        refused(finished, "weights was ")
    finally:
        safetensors.numpy.save_file(tensors, path)


def test_an_edited_config_is_refused(finished, tmp_path, monkeypatch):
    for path in methods.METHODS_DIR.glob("*.gin"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(methods, "METHODS_DIR", tmp_path)
    (tmp_path / "knorm.gin").write_text((tmp_path / "knorm.gin").read_text() + "method.prefill_chunk = 32\n")
    changed = "-method.prefill_chunk = None; +method.prefill_chunk = 32"
    refused(finished, f"holds results of another knorm keep=0.5 ({changed})")
    assert evaluate(*flags(finished, "--methods=keydiff"))[0] == 0  # the others are what they were


def test_another_setting_is_refused_by_name(finished):
    refused(finished, "call_tokens was 32 and is 16", "--gin_bindings=Settings.call_tokens = 16")


def test_started_anew_by_name_the_lines_are_new(finished, tmp_path):
    for name in ("run.json", "results.jsonl"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes((finished / "out" / name).read_bytes())
    anew = (f"--output_dir={tmp_path / 'out'}", "--keep=0.25", "--overwrite", "--cache_dtype=float32")
    code, _, err = evaluate(*flags(finished, *anew))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["budget_tokens"] for row in rows if row["method"] == "knorm"} == {15, 10}


def test_weights_that_are_not_finite_are_refused(finished, tmp_path):
    tiny_checkpoint.write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, path)
    code, _, err = evaluate(*flags(finished, f"--model={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}"))
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: method full: its predictions for a are NaN; the weights or acti")


def test_a_binding_for_a_method_that_is_not_run_is_refused(finished):
    code, _, err = evaluate(*flags(finished, "--gin_bindings=snapkv.window = 7"))
    assert (code, err) == (2, "error: --gin_bindings: nothing here uses snapkv, got 'snapkv.window = 7'.\n")


def test_a_budget_that_a_method_refuses_is_named_with_it(finished):
    code, _, err = evaluate(*flags(finished, "--methods=d2o", "--gin_bindings=d2o.sinks = (1,)", "--dry_run"))
    assert code == 2 and err.startswith("error: d2o.sinks must be a whole number")
    code, _, err = evaluate(*flags(finished, "--methods=knorm,SnapKV", "--dry_run"))
    assert code == 2 and "unknown method 'SnapKV'; did you mean 'snapkv'? There are " in err


@pytest.mark.parametrize("more, over", [(0.0, False), (0.5, False), (1.0, True)])
def test_what_is_kept_beyond_the_budget_is_counted(more, over, finished, tmp_path, monkeypatch):
    kept = kvjax.kept_tokens
    monkeypatch.setattr(kvjax, "kept_tokens", lambda cache: kept(cache) + more)
    code, out, err = evaluate(*flags(finished, f"--output_dir={tmp_path}", "--max_examples=1"))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["method"]: row["over_budget"] for row in rows} == {"full": None, "knorm": over}
    assert ("More than the budget was kept on: knorm 1 of 1 examples" in out) == over
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["methods"]["knorm"]["mean"]["over_budget"] == float(over)


def test_lines_of_examples_that_the_file_no_longer_has_are_refused_also_where_not_all_are_run(finished, lines):
    named = lambda task, *which: [line | {"task": task} for line in which]
    try:
        write(finished, named("z", *lines))
        refused(finished, "holds results of example a/0, which the tasks no longer have", "--max_examples=1")
        write(finished, [lines[0], lines[1] | {"answer_ids": [9, *lines[1]["answer_ids"][1:]]}])
        refused(finished, "another example a/1 (content was ", "--max_examples=1")
        write(finished, [lines[0], lines[1], *named("z", *lines)])
        before = (finished / "out" / "results.jsonl").read_bytes()
        code, out, err = evaluate(*flags(finished, "--max_examples=1"))
        assert code == 0 and "z" in out, err
        after = (finished / "out" / "results.jsonl").read_bytes()
        added = [json.loads(line) for line in after.removeprefix(before).splitlines()]
        assert [(row["method"], row["task"], row["example"]) for row in added] == [("full", "z", 0), ("knorm", "z", 0)]
        (finished / "out" / "results.jsonl").write_bytes(before)
    finally:
        write(finished, lines)
