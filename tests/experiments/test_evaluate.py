"""The evaluation program, run as a user runs it."""

import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import calibrations
from experiments import evaluate as program
from experiments import evaluator
from experiments.benchmarks import text_windows
from models import load_model
from models.decoder import forward, prompt_cache
from tests.experiments import in_process, tiny_checkpoint
from tests.quick_jit import quick_jit

ROOT = pathlib.Path(__file__).parents[2]
VOCAB = 263


def start(*flags, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.evaluate", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def evaluate_as_process(*flags, **kwargs):
    """As a user runs it: exit code, standard output and standard error."""
    process = start(*flags, **kwargs)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


evaluate = functools.partial(in_process.call, program)


@pytest.fixture(scope="module", autouse=True)
def calibrations_elsewhere(tmp_path_factory):
    """What the evaluation calibrates by itself is kept, but not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrations, "cache_dir", lambda: tmp_path_factory.getbasetemp() / "cache")
        yield


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    """Three questions, two with an answer to score and one without an answer."""
    rng = np.random.default_rng(1)
    ids = lambda n: rng.integers(3, VOCAB, n).tolist()
    lines = [
        {"task": "a", "context_ids": ids(120), "question_ids": ids(9), "answer_ids": ids(4)},
        {"task": "a", "context_ids": ids(120), "question_ids": [], "answer_ids": ids(3)},
        {"task": "b", "context_ids": ids(120), "question_ids": ids(40)},
    ]
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# One method of every kind of cache, of what is collected for it, and of when it acts; the conformance suite runs all.
METHODS = (
    *("full", "int4", "snapkv_int4", "h2o_chunked", "adakv_snapkv", "kvzip"),
)


@pytest.fixture(scope="module")
def finished(checkpoint, task_file, tmp_path_factory):
    """A run over methods of every kind, on the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("out") / "run"
    code, out, err = evaluate(
        f"--model={checkpoint}",
        f"--tasks={task_file}",
        f"--methods={','.join(METHODS)}",
        "--keep=0.4",
        "--cache_dtype=float32",
        f"--output_dir={folder}",
        # 120 tokens must be more than an exact tail or a window.
        "--gin_bindings=kivi.residual = 32",
    )
    assert code == 0, err
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return folder, out, rows


def test_every_method_scores_every_example(finished):
    _, _, rows = finished
    assert {(r["method"], r["task"], r["example"]) for r in rows} == {
        (m, t, e) for m in METHODS for t, e in (("a", 0), ("a", 1), ("b", 0))
    }
    for row in rows:
        if row["task"] == "b":  # no answer in the file
            assert row["nll"] is row["exact_match"] is row["score"] is row["prediction"] is None
        else:
            assert row["nll"] > 0 and row["exact_match"] in (True, False)
            assert row["score"] in (0.0, 1.0) and isinstance(row["prediction"], str)
        assert row["prefill_seconds"] > 0


def test_full_cache_scores_are_those_of_the_plain_decoder(finished, checkpoint, task_file):
    _, _, rows = finished
    model = load_model(str(checkpoint))
    for index, line in enumerate(json.loads(x) for x in task_file.read_text().splitlines()[:2]):
        ids = line["context_ids"] + line["question_ids"] + line["answer_ids"]
        logits, _ = forward(
            model.params, model.config, jnp.asarray([ids]), jnp.arange(len(ids))[None], prompt_cache(model.config, 1)
        )
        logits = np.asarray(logits[0], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        answer = line["answer_ids"]
        expected = -np.mean([log_probs[len(ids) - len(answer) - 1 + i, t] for i, t in enumerate(answer)])
        row = next(r for r in rows if r["method"] == "full" and r["task"] == "a" and r["example"] == index)
        assert row["nll"] == pytest.approx(expected, abs=1e-4)


def test_bytes_are_smaller_and_budgets_are_kept(finished):
    _, _, rows = finished
    for row in rows:
        if row["method"] == "full":
            # positions of 4 bytes stand beside 2 x 32 numbers of 4 bytes, or of 2: the ratio is to 16 bits
            slots = 2 * 2 * 120
            assert row["cache_bytes"] == slots * (2 * 32 * 4 + 4) + 4 and row["kept_tokens"] == 120
            assert row["full_bytes"] == slots * (2 * 32 * 2 + 4) + 4
            assert row["allocated_bytes"] > row["cache_bytes"]  # room for the question and the answer
        else:
            assert row["cache_bytes"] < 2 * row["full_bytes"] and row["cache_bytes"] <= row["allocated_bytes"]
        if row["budget_tokens"] is not None:
            assert row["budget_tokens"] == 48  # 0.4 of 120
            rounding = 0.5 if row["method"] == "adakv_snapkv" else 0  # of the heads' shares
            assert abs(row["kept_tokens"] - 48) <= rounding
        if row["method"] != "full" and row["nll"] is not None:
            assert row["kl"] > 0


def test_report_is_written(finished):
    folder, out, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert "--keep=0.4" in summary["command"]
    assert summary["versions"]["jax"] and "snapkv.window = 32" in summary["gin_config"]
    assert (folder / "pareto.png").stat().st_size > 10_000
    assert "snapkv_int4" in out and "No token budget" in out


def test_dry_run_says_the_bytes_that_the_run_measures(finished, checkpoint, task_file):
    _, _, rows = finished
    code, out, err = evaluate(
        f"--model={checkpoint}", f"--tasks={task_file}", "--methods=int4,h2o_chunked", "--keep=0.4", "--dry_run",
        "--cache_dtype=float32",
        "--gin_bindings=kivi.residual = 32",
    )
    assert code == 0, err
    for name in ("int4", "h2o_chunked"):
        size = next(r["cache_bytes"] for r in rows if r["method"] == name)
        line = next(x for x in out.splitlines() if x.strip().startswith(name + " "))
        assert f"{size / 1024:.1f} KiB" in line or f"{size / 1024:.0f} KiB" in line


def greedy(model, ids, count):
    """What the plain decoder writes behind some tokens."""
    new = []
    for _ in range(count):
        now = jnp.asarray([ids + new])
        cache = prompt_cache(model.config, 1)
        logits, _ = forward(model.params, model.config, now, jnp.arange(now.shape[1])[None], cache)
        new.append(int(jnp.argmax(logits[0, -1])))
    return new


def test_prediction_is_what_greedy_decoding_writes_up_to_its_end(checkpoint, tmp_path):
    """The answers: what greedy decoding writes, the same with another last token, and a text cut at a stop."""
    model = load_model(str(checkpoint))
    ids = np.random.default_rng(2).integers(3, VOCAB, 40).tolist()
    written = greedy(model, ids, 8)
    assert not set(written) & set(model.tokenizer.eos_ids)
    text, stop = model.tokenizer.decode(written), model.tokenizer.decode(written[4:5])
    wrong = [*written[:2], (written[2] + 1) % VOCAB]
    line = {"context_ids": ids, "max_new_tokens": 8, "metric": "exact"}
    lines = [
        line | {"task": "right", "answer_ids": written[:3], "answers": [text]},
        line | {"task": "wrong", "answer_ids": wrong, "answers": [text]},
        line | {"task": "unanswered", "answers": ["", text]},
        line | {"task": "cut", "answer_ids": wrong, "answers": ["-"], "stop": [stop]},
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    code, _, err = evaluate(
        f"--model={checkpoint}", f"--tasks={path}", "--methods=full", "--cache_dtype=float32",
        f"--output_dir={tmp_path}",
    )
    assert code == 0, err
    rows = {row["task"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    for task, exact_match in (("right", True), ("wrong", False), ("unanswered", None)):
        assert (rows[task]["prediction"], rows[task]["score"]) == (text, 1.0)
        assert rows[task]["exact_match"] is exact_match
    assert rows["cut"]["prediction"] == text[: text.index(stop)] and rows["cut"]["score"] == 0.0


def test_several_budgets_and_more_of_them_later_are_one_table(checkpoint, task_file, tmp_path):
    given = (f"--model={checkpoint}", f"--tasks={task_file}", "--methods=knorm,int4", "--max_examples=1")
    given += (f"--output_dir={tmp_path}", "--gin_bindings=kivi.residual = 32")
    code, out, err = evaluate(*given, "--keep=0.5,0.25")
    assert code == 0, err
    before = (tmp_path / "results.jsonl").read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [(row["method"], row["keep"], row["kept_tokens"]) for row in rows if row["task"] == "a"] == [
        ("full", None, 120),
        ("knorm", 0.5, 60),
        ("knorm", 0.25, 30),
        ("int4", None, 120),
    ]
    assert ["method", "keep"] in [line.split()[:2] for line in out.splitlines()]
    code, out, err = evaluate(*given, "--budget=7,9")
    assert code == 0, err
    after = (tmp_path / "results.jsonl").read_text()
    assert after.startswith(before)
    added = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    assert {(row["method"], row["budget"], row["kept_tokens"]) for row in added} == {("knorm", 7, 7), ("knorm", 9, 9)}
    assert len([line for line in out.splitlines() if "knorm" in line and "KiB" in line]) == 4


def test_a_killed_run_of_several_settings_computes_nothing_again(checkpoint, task_file, tmp_path, monkeypatch):
    """What a kill leaves is a prefix of the lines, the last one perhaps cut."""
    given = (f"--model={checkpoint}", f"--tasks={task_file}", "--methods=knorm", "--keep=0.5,0.25")
    assert evaluate(*given, f"--output_dir={tmp_path}")[0] == 0
    path = tmp_path / "results.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:50])  # the first example, and the full cache on the second
    scored = []
    score = evaluator.Evaluator.score

    def counted(self, method, dense, asked, references):
        scored.append((method.setting, asked.examples[0].task))
        return score(self, method, dense, asked, references)

    monkeypatch.setattr(evaluator.Evaluator, "score", counted)
    code, _, err = evaluate(*given, f"--output_dir={tmp_path}")
    assert code == 0, err
    # of the second example the full cache runs again, whose predictions the others are compared with
    settings = ["full", "knorm keep=0.5", "knorm keep=0.25"]
    assert scored == [(name, task) for task in ("a", "b") for name in settings]
    timed = ("prefill_seconds", "decode_tokens_per_second")
    numbers = lambda text: [{k: v for k, v in json.loads(x).items() if k not in timed} for x in text.splitlines()]
    assert numbers(path.read_text()) == numbers(whole)


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    """Questions of several lengths about contexts of several lengths, and a text that is only predicted."""
    rng = np.random.default_rng(3)
    ids = lambda n: rng.integers(3, VOCAB, n).tolist()
    lines = [
        {"task": task, "context_ids": ids(context), "question_ids": ids(question), "answer_ids": ids(answer)}
        for task, context, question, answer in (
            *(("a", 96, 9, 4), ("a", 90, 40, 3), ("b", 96, 0, 2), ("a", 70, 3, 5), ("b", 96, 1, 2)),
        )
    ]
    path = tmp_path_factory.mktemp("mixed") / "tasks.jsonl"
    path.write_text("".join(json.dumps(line | {"max_new_tokens": 6}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def one_by_one(checkpoint, mixed_file, tmp_path_factory):
    return numbers_of(checkpoint, mixed_file, tmp_path_factory.mktemp("one"))


def numbers_of(checkpoint, path, folder, *flags, methods="int4,adakv_snapkv"):
    """The lines of a run, by method, task and example."""
    given = (f"--model={checkpoint}", f"--tasks={path}", f"--methods={methods}", "--keep=0.6")
    given += ("--gin_bindings=kivi.residual = 32", "--cache_dtype=float32", f"--output_dir={folder}")
    code, _, err = evaluate(*given, *flags)
    assert code == 0, err
    rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {(row["method"], row["task"], row["example"]): row for row in rows}


def assert_same_numbers(rows, expected):
    assert rows.keys() <= expected.keys()
    for key, row in rows.items():
        for field in ("prediction", "score", "exact_match", "budget_tokens"):
            assert row[field] == expected[key][field], (key, field)
        for field in ("nll", "kl", "kept_tokens"):
            # float32 in another order, over a log-softmax of some hundred logits
            wanted = expected[key][field]
            assert row[field] == (wanted and pytest.approx(wanted, rel=1e-4, abs=1e-4)), (key, field)


def test_examples_read_together_get_the_numbers_that_they_get_alone(one_by_one, checkpoint, mixed_file, tmp_path):
    rows = numbers_of(checkpoint, mixed_file, tmp_path, "--batch=3")  # the last group of a kind is not full
    assert len(rows) == 15
    assert_same_numbers(rows, one_by_one)
    assert all(row["cache_bytes"] == one_by_one[key]["cache_bytes"] for key, row in rows.items())


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_same_numbers(one_by_one, checkpoint, mixed_file, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator.Evaluator, "jit", staticmethod(quick_jit))
    mesh = "--mesh=data:2,seq:2,model:2"
    rows = numbers_of(checkpoint, mixed_file, tmp_path, "--batch=2", mesh, methods="int4")
    assert len(rows) == 10
    assert_same_numbers(rows, one_by_one)
    for key, row in rows.items():  # a mesh may round slots up, so that every device has as many
        assert one_by_one[key]["cache_bytes"] <= row["cache_bytes"] < 1.5 * one_by_one[key]["cache_bytes"]


def test_a_method_file_of_ones_own_runs_under_its_name(checkpoint, task_file, tmp_path):
    (tmp_path / "mine.gin").write_text("method.transform = @knorm()\nknorm.budget = %budget\n")
    given = (f"--model={checkpoint}", f"--tasks={task_file}", f"--output_dir={tmp_path}", "--max_examples=1")
    code, out, err = evaluate(*given, f"--methods={tmp_path}/mine.gin")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["kept_tokens"]) for row in rows if row["task"] == "a"] == [("full", 120), ("mine", 60)]
    (tmp_path / "knorm.gin").write_text("method.transform = @knorm()\nknorm.budget = %budget\n")
    for names, wanted in (
        (f"{tmp_path}/none.gin", "--methods: no such file:"),
        (f"knorm,{tmp_path}/knorm.gin", "are both called knorm: rename the file."),
    ):
        code, _, err = evaluate(*given, f"--methods={names}")
        assert code == 2 and wanted in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_texts_are_read_in_windows_of_every_length(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(text_windows, "PREDICTED", 20)
    (tmp_path / "book.txt").write_text("".join(chr(97 + i * i % 26) for i in range(400)))
    given = (f"--model={checkpoint}", f"--tasks={tmp_path}/book.txt", "--methods=knorm", "--keep=0.5", "--batch=2")
    given += ("--context=32,64", "--dtype=bfloat16", f"--output_dir={tmp_path}")
    code, out, err = evaluate(*given)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["task"] for row in rows} == {"book"}  # two methods, two lengths, three windows
    for row in rows:
        assert row["context_tokens"] == row["length"] and row["score"] is row["prediction"] is None
        assert row["nll"] > 0 and row["kept_tokens"] == row["length"] / (1 + (row["method"] == "knorm"))
    assert "ppl" in out and ["method", "context"] in [line.split()[:2] for line in out.splitlines()]
    assert pathlib.Path(tmp_path / "results.csv").read_text().count("\n") == 13


def test_bindings_reach_hyper_parameters(checkpoint, task_file):
    given = (f"--model={checkpoint}", f"--tasks={task_file}", "--methods=snapkv", "--keep=0.4", "--dry_run")
    code, out, _ = evaluate(*given, "--gin_bindings=snapkv.window = 7", "--gin_bindings=snapkv.pooling = 'max'")
    assert code == 0 and "snapkv.window = 7" in out and "snapkv.pooling = 'max'" in out


def test_question_aware_compresses_after_the_question(checkpoint, task_file, tmp_path):
    code, _, err = evaluate(
        f"--model={checkpoint}", f"--tasks={task_file}", "--methods=knorm", "--keep=0.5", "--question_aware",
        f"--output_dir={tmp_path}", "--max_examples=1",
    )  # fmt: skip
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    kept = {(r["method"], r["task"]): r["kept_tokens"] for r in rows}
    assert kept["knorm", "a"] == 64 and kept["knorm", "b"] == 80  # half of context and question


def test_interrupted_run_keeps_its_lines_and_goes_on(checkpoint, task_file, tmp_path):
    given = (f"--model={checkpoint}", f"--tasks={task_file}", "--methods=knorm", f"--output_dir={tmp_path}")
    process = start(*given)
    results = tmp_path / "results.jsonl"
    deadline = time.time() + 200
    while time.time() < deadline and not (results.exists() and results.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    before = results.read_text()
    if process.returncode == 130:
        assert "lines are kept" in err and "the same command goes on" in err
    assert before.count("\n") >= 2
    code, out, err = evaluate(*given)
    assert code == 0, err
    assert results.read_text().startswith(before)
    assert results.read_text().count("\n") == 6
    code, _, err = evaluate(*given, "--cache_dtype=float32")
    assert code == 2 and "cache_dtype was 'bfloat16' and is 'float32'" in err and "--overwrite" in err


BAD = {
    "unknown flag": (["--metods=full"], "metods"),
    "stray argument": (["full"], "unexpected argument 'full'"),
    "unknown method": (["--methods=full,snapkw"], "unknown method 'snapkw'"),
    "no method": (["--methods="], "--methods"),
    "missing gin file": (["--gin_file=no/such.gin"], "no/such.gin"),
    "unknown gin name": (["--gin_bindings=snapkvv.window = 3"], "snapkvv"),
    "unknown gin parameter": (["--gin_bindings=snapkv.windows = 3", "--methods=snapkv"], "windows"),
    "gin syntax": (["--gin_bindings=snapkv.window ="], "snapkv.window"),
    "zero budget": (["--budget=0"], "--budget must be at least 1"),
    "budget of the whole context": (["--budget=120", "--methods=knorm"], "nothing would be compressed"),
    "budget below the window": (["--budget=20", "--methods=snapkv"], "32 recent tokens"),
    "keep and budget": (["--keep=0.5", "--budget=12"], "--keep and --budget"),
    "context and tasks": (["--context=64"], "--context is for generated tasks and texts"),
    "context of words": (["--context=long"], "--context=long: expected a number of tokens, or several"),
    "read above one": (["--read=1.5"], "--read must be a fraction in (0, 1] or at least 1 token, got 1.5"),
    "keep above one": (["--keep=1.5"], "--keep must be in (0, 1]"),
    "one keep above one": (["--keep=0.5,1.5"], "--keep must be in (0, 1], got 1.5"),
    "no examples at once": (["--batch=0"], "--batch must be at least 1, got 0"),
    "places without devices": (["--mesh=data:3"], "mesh data:3 has 3 places, but there are 8 devices"),
    "keep of words": (["--keep=0.5,half"], "--keep=0.5,half: expected a fraction, or several"),
    "unknown task": (["--tasks=needels"], "unknown task 'needels'"),
    "even kernel": (["--methods=snapkv", "--gin_bindings=snapkv.kernel = 4"], "kernel must be odd"),
    "five bits": (["--methods=int4", "--gin_bindings=kivi.bits = 5"], "bits must be 2, 3, 4 or 8"),
    "group does not divide": (["--methods=int4", "--gin_bindings=kivi.group = 24"], "key_group must divide residual"),
    "missing tasks": (["--tasks=no/such.jsonl"], "no/such.jsonl"),
    "missing checkpoint": (["--model=no/such/dir/"], "no/such/dir"),
    "dtype": (["--gin_bindings=Settings.dtype = 'float8'"], "dtype"),
    "no output_dir": ([], "--output_dir"),
    "max_examples": (["--max_examples=0"], "--max_examples must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_give_one_clear_line(case, checkpoint, task_file, tmp_path):
    wrong, named = BAD[case]
    defaults = {"--model": checkpoint, "--tasks": task_file, "--output_dir": tmp_path}
    if case == "no output_dir":
        del defaults["--output_dir"]
    named_flags = {flag.split("=")[0] for flag in wrong}
    rest = (f"{k}={v}" for k, v in defaults.items() if k not in named_flags)
    code, out, err = evaluate(*rest, *wrong)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], err
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    "line, named",
    [
        ({"task": "t", "context_ids": []}, "context: got an empty prompt"),
        ({"task": "t", "context": ""}, "context"),
        ({"task": "t", "context_ids": list(range(3, 250)), "question_ids": [5] * 10}, "was trained for 256"),
        ({"task": "t", "context_ids": [VOCAB]}, "context_ids"),
    ],
    ids=["no tokens", "no text", "beyond the model", "beyond the vocabulary"],
)
def test_bad_tasks_give_one_clear_line(line, named, checkpoint, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(line) + "\n")
    code, _, err = evaluate(f"--model={checkpoint}", f"--tasks={path}", f"--output_dir={tmp_path / 'out'}")
    assert code == 2 and err.startswith("error: ") and named in err and err.count("\n") == 1


def test_truncated_checkpoint_is_refused(checkpoint, task_file, tmp_path):
    broken = tiny_checkpoint.write(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _, err = evaluate(f"--model={broken}", f"--tasks={task_file}", f"--output_dir={tmp_path / 'out'}")
    assert code == 2 and "model.safetensors" in err and err.count("\n") == 1


def test_full_disk_keeps_the_finished_lines(checkpoint, task_file, tmp_path):
    """The file-size limit of the process stands in for the disk's end: the kernel refuses the write."""
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # more than run.json, less than nine lines

    given = (f"--model={checkpoint}", f"--tasks={task_file}", "--methods=knorm,keydiff", f"--output_dir={tmp_path}")
    uncached = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}  # it would leave halves of programs to other tests
    code, _, err = evaluate_as_process(*given, preexec_fn=limit, env=uncached)
    assert code == 2 and "no space left" in err
    kept = (tmp_path / "results.jsonl").read_text()
    assert kept.endswith("\n") and 1 <= kept.count("\n") < 9
    assert all(json.loads(line) for line in kept.splitlines())
    code, _, err = evaluate(*given)
    assert code == 0, err
    assert (tmp_path / "results.jsonl").read_text().startswith(kept)


@pytest.mark.slow
def test_smollm2_finds_a_needle_in_its_compressed_cache(tmp_path):
    found = ("needle_noise", "passkey", "niah_single_1", "niah_single_2")
    code, out, err = evaluate(
        "--methods=int8,streamingllm",
        "--keep=0.5",
        "--context=640",
        f"--tasks={','.join(found)},text",
        "--gin_bindings=Settings.examples = 1",
        f"--output_dir={tmp_path}",
    )
    assert code == 0, err
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    rows = {(r["method"], r["task"]): r for r in map(json.loads, lines)}
    assert all(r["length"] == 640 for r in rows.values())
    for name, task in itertools.product(("full", "int8"), found):
        assert rows[name, task]["score"] == 1.0 and rows[name, task]["exact_match"] is True
    assert rows["streamingllm", "needle_noise"]["score"] == 0.0  # the needle, at the middle, is gone
    assert abs(rows["int8", "text"]["nll"] - rows["full", "text"]["nll"]) < 0.01
    assert rows["int8", "text"]["full_bytes"] / rows["int8", "text"]["cache_bytes"] > 1.5
    assert (tmp_path / "needle.png").exists() and "noise" in out
