"""Results on disk: what survives a cut, a full disk and a second start, and what a summary says."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from experiments.results import FIELDS, Line, ResultsFile, Sources

SETTINGS = {"model": "tiny", "seed": 0}


def row(method="full", task="needle", example=0, **fields):
    values = {
        "nll": 0.5,
        "exact_match": True,
        "score": 1.0,
        "metric": "match_all",
        "prediction": " 7",
        "cache_bytes": 100,
        "full_bytes": 400,
        "kept_tokens": 8,
        "prefill_seconds": 1.0,
        "decode_tokens_per_second": 20.0,
    }
    line = {"method": method, "task": task, "example": example, "length": None, "keep": None, "budget": None}
    return line | values | fields


def open_and_close(directory, settings=SETTINGS):
    with ResultsFile(directory, settings):
        pass


def lines(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def test_lines_are_on_disk_before_the_file_is_closed(tmp_path):
    with ResultsFile(tmp_path / "new" / "run", SETTINGS) as results:
        results.append(row(kl=0.25, depth=0.5))
        assert lines(tmp_path / "new" / "run") == [row(kl=0.25, depth=0.5)]
        assert list(lines(tmp_path / "new" / "run")[0])[: len(FIELDS)] == list(FIELDS)


def test_second_start_keeps_lines_and_drops_the_cut_one(tmp_path):
    with ResultsFile(tmp_path, SETTINGS) as results:
        for example in range(3):
            results.append(row(example=example))
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(json.dumps(row())) + 1):  # wherever in the last line the program died
        path.write_bytes(whole[:-cut])
        with ResultsFile(tmp_path, SETTINGS) as results:
            assert results.rows == [row(example=0), row(example=1)]
            assert Line("full", "needle", 1) in results and Line("full", "needle", 2) not in results
            results.append(row(example=2))
        assert path.read_bytes() == whole


def test_row_is_taken_once(tmp_path):
    with ResultsFile(tmp_path, SETTINGS) as results:
        results.append(row())
        with pytest.raises(ValueError, match="a second time"):
            results.append(row(nll=3.0))
    assert lines(tmp_path) == [row()]


def test_row_without_a_field_is_refused(tmp_path):
    with ResultsFile(tmp_path, SETTINGS) as results, pytest.raises(ValueError, match="got no nll, kept_tokens"):
        results.append({field: 0 for field in FIELDS if field not in ("nll", "kept_tokens")})


def test_other_settings_are_refused_with_both_values(tmp_path):
    open_and_close(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"seed was 0 and is 1.*--output_dir, or --overwrite") as error:
        open_and_close(tmp_path, SETTINGS | {"seed": 1})
    assert "model" not in str(error.value)


def test_order_of_settings_does_not_matter(tmp_path):
    open_and_close(tmp_path, {"a": 1, "b": (2, 3)})
    open_and_close(tmp_path, {"b": [2, 3], "a": 1})


def test_overwrite_starts_afresh(tmp_path):
    with ResultsFile(tmp_path, SETTINGS) as results:
        results.append(row())
    (tmp_path / "summary.json").write_text("{}")
    with ResultsFile(tmp_path, {"seed": 1}, overwrite=True) as results:
        assert results.rows == [] and lines(tmp_path) == []
    assert not (tmp_path / "summary.json").exists()
    open_and_close(tmp_path, {"seed": 1})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.jsonl", "precious\n", "results.jsonl without its run.json"),
        ("run.json", "[]", "not the settings of an evaluation"),
        ("run.json", "{", "not the settings of an evaluation"),
    ],
)
def test_foreign_files_are_left_alone(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_and_close(tmp_path, SETTINGS)
    assert (tmp_path / name).read_text() == text


def sources(config="a = 1\nb = 2", content="x", **more):
    return Sources(methods={"full": config, **more}, examples={("needle", None, 0): {"content": content}})


def test_lines_of_another_configuration_or_example_are_refused_by_name(tmp_path):
    with ResultsFile(tmp_path, SETTINGS, sources()) as results:
        results.append(row())
    for now, wanted in (
        (sources(config="a = 1\nb = 3"), r"holds results of another full \(-b = 2; \+b = 3\); pass another"),
        (sources(content="y"), r"of another example needle/0 \(content was 'x' and is 'y'\); pass another"),
        (Sources(growing=["other"]), r"results of example needle/0, which the tasks no longer have; pass another"),
    ):
        with pytest.raises(ValueError, match=wanted):
            ResultsFile(tmp_path, SETTINGS, now)
    with ResultsFile(tmp_path, SETTINGS, sources(content="y"), overwrite=True) as results:
        assert results.rows == []


def test_what_has_no_line_yet_may_change_and_what_is_new_is_remembered(tmp_path):
    with ResultsFile(tmp_path, SETTINGS, sources(int4="bits = 4")) as results:
        results.append(row())
    with ResultsFile(tmp_path, SETTINGS, sources(int4="bits = 2")) as results:
        results.append(row(method="int4"))
    with ResultsFile(tmp_path, SETTINGS, Sources()) as results:  # neither is run: their lines stay
        assert len(results.rows) == 2
    with pytest.raises(ValueError, match=r"another int4 \(-bits = 2; \+bits = 4\)"):
        ResultsFile(tmp_path, SETTINGS, sources(int4="bits = 4"))


def test_results_that_do_not_say_what_they_are_of_are_refused(tmp_path):
    open_and_close(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"fingerprint": "0", "settings": SETTINGS}))
    with pytest.raises(ValueError, match="of an earlier version, which do not say what they are of; pass another"):
        open_and_close(tmp_path)


def test_damaged_line_in_the_middle_is_named(tmp_path):
    with ResultsFile(tmp_path, SETTINGS) as results:
        results.append(row())
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: got b'\{\}"):
        open_and_close(tmp_path, SETTINGS)
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files with setrlimit")
def test_where_no_more_fits_the_finished_lines_stay(tmp_path):
    """A process whose files may have 900 bytes writes rows until the system stops it in the middle of one."""
    program = f"""
        import resource, sys
        sys.path[:0] = {sys.path!r}
        from experiments.results import ResultsFile
        with ResultsFile({str(tmp_path)!r}, {SETTINGS!r}) as results:
            resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
            try:
                for example in range(100):
                    results.append({row()!r} | {{"example": example}})
            except OSError as error:
                print(error.errno, len(results.rows), error)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    code, count, message = ran.stdout.strip().split(" ", 2)
    assert int(code) == errno.EFBIG
    kept = lines(tmp_path)
    assert int(count) == len(kept) == 900 // (len(json.dumps(row())) + 1)
    assert (tmp_path / "results.jsonl").stat().st_size < 900
    assert f"no space left; {count} finished lines are kept; make room and run the same command again" in message
    with ResultsFile(tmp_path, SETTINGS) as results:
        assert results.rows == kept
        results.append(row(example=50))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_error_that_shows_only_at_fsync_takes_the_line_back(tmp_path, monkeypatch, code):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    with ResultsFile(tmp_path, SETTINGS) as results:
        results.append(row())
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left; 1 finished lines are kept"):
            patch.setattr(os, "fsync", fail)
            results.append(row(example=1))
        assert lines(tmp_path) == [row()]
        results.append(row(example=1))
    assert lines(tmp_path) == [row(), row(example=1)]


def test_numbers_that_are_not_finite_become_null_and_array_scalars_numbers(tmp_path):
    with ResultsFile(tmp_path, SETTINGS) as results:
        results.append(row(nll=float("nan"), kl=np.float32(0.5), exact_match=np.bool_(False), x=[float("inf")]))
    (line,) = lines(tmp_path)
    assert (line["nll"], line["kl"], line["exact_match"], line["x"]) == (None, 0.5, False, [None])


def test_budgets_and_lengths_are_lines_of_their_own(tmp_path):
    settings = [dict(keep=0.5), dict(keep=0.25), dict(keep=0.5, length=64), dict(budget=8)]
    with ResultsFile(tmp_path, SETTINGS) as results:
        for setting in settings:
            results.append(row("snapkv", **setting))
    with ResultsFile(tmp_path, SETTINGS) as results:
        assert len(results.rows) == 4
        for setting in settings:
            assert Line("snapkv", "needle", 0, **setting) in results
            with pytest.raises(ValueError, match="a second time"):
                results.append(row("snapkv", **setting))
        assert Line("snapkv", "needle", 0) not in results
    titles = [Line.of(row).setting for row in lines(tmp_path)]
    assert titles == ["snapkv keep=0.5", "snapkv keep=0.25", "snapkv keep=0.5", "snapkv budget=8"]


def test_a_changed_configuration_is_that_of_its_budget_alone(tmp_path):
    with ResultsFile(tmp_path, SETTINGS, Sources(methods={"snapkv keep=0.5": "a = 1"})) as results:
        results.append(row("snapkv", keep=0.5))
    with ResultsFile(tmp_path, SETTINGS, Sources(methods={"snapkv keep=0.25": "a = 2"})) as results:
        results.append(row("snapkv", keep=0.25))
    with pytest.raises(ValueError, match=r"another snapkv keep=0.5 \(-a = 1; \+a = 2\)"):
        ResultsFile(tmp_path, SETTINGS, Sources(methods={"snapkv keep=0.5": "a = 2"}))


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        (row(), "line 2: got full, needle/0 again, as in line 1, expected each once; pass another"),
        (row(example=1, nll="abc"), "line 2: nll: got 'abc', expected a number or null"),
        (row(example=1, nll=float("nan")), "line 2: nll: got nan, expected a number or null"),
        (row(example=1, kl=True), "line 2: kl: got True, expected a number or null"),
        (row(example=1, exact_match=3), "line 2: exact_match: got 3, expected true, false or null"),
        (row(example=True), "line 2: example: got True, expected a whole number"),
        (row(example=1, prediction=7), "line 2: prediction: got 7, expected a text or null"),
        (row(method=["full"]), "line 2: method: got ['full'], expected a name"),
        ({name: x for name, x in row().items() if name != "nll"}, "line 2: got no nll, expected all of method"),
        ([1], "line 2: got b'[1]', expected a line of results"),
    ],
)
def test_a_damaged_line_is_named_with_its_field_and_kept(second, wanted, tmp_path):
    open_and_close(tmp_path)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (row(), second, row(example=7))))
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        open_and_close(tmp_path)
    assert f"{path}, {wanted}" in str(error.value) and "--overwrite" in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 5000, b"{}\r{}", b"\xff"])
def test_lines_and_settings_that_cannot_be_read_are_named(text, tmp_path):
    open_and_close(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(text + b"\n" + json.dumps(row()).encode() + b"\n")
    with pytest.raises(ValueError, match="results.jsonl, line 1: got b'.*, expected a line of results; pass another"):
        open_and_close(tmp_path)
    (tmp_path / "results.jsonl").unlink()
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(ValueError, match="run.json: got a file that is not the settings of an evaluation; pass"):
        open_and_close(tmp_path)


@pytest.mark.parametrize(
    "part", [{"settings": [1]}, {"methods": "x"}, {"methods": {"full": 3}}, {"examples": [1]}, {"examples": {"t/0": 3}}]
)
def test_settings_of_other_types_inside_are_refused(part, tmp_path):
    about = {"settings": SETTINGS, "methods": {}, "examples": {}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    open_and_close(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(about | part))
    with pytest.raises(ValueError, match="run.json: got a file that is not the settings of an evaluation"):
        open_and_close(tmp_path)
