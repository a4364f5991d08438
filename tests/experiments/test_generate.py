"""`python -m experiments.generate`: text from compressed caches, the same with and without drafts."""

import json

import pytest

from experiments import generate
from experiments.generation import read_prompts
from tests.experiments import in_process


@pytest.fixture(scope="module")
def run(checkpoint):
    return lambda *flags: in_process.call(generate, f"--model={checkpoint}", *flags)


def _texts(out: str) -> dict[str, str]:
    """What stands below each title."""
    parts = out[: out.rindex("\n\n")].split("--- ")[1:]
    return dict(part.rstrip("\n").split("\n", 1) for part in parts)


def test_drafts_change_no_text_and_the_table_says_what_it_took(run):
    flags = ("--prompt=ab ab ab ab ab", "--raw", "--max_new_tokens=12", "--methods=int8")
    code, out, err = run(*flags, "--draft=ngram", "--compare")
    assert code == 0, err
    texts = _texts(out)
    assert len(texts) == 2 and texts["int8"] == texts["int8, drafts of ngram"]
    head, plain, drafted, same = out.strip().splitlines()[-4:]
    assert same == "Texts with drafts are the same."
    assert head.split()[:3] == ["cache", "of", "16"] and plain.split()[0] == drafted.split()[0] == "int8"
    assert "ngram" in drafted and drafted.endswith("x") and "%" in drafted


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--draft=jacobi", "--draft_tokens=3"), ("--temperature=0.7",)])
def test_text_that_is_shown_as_it_comes_is_the_same(run, more):
    flags = ("--prompt=ab ab ab ab ab", "--max_new_tokens=20", "--methods=streamingllm", *more)
    whole, pieces = run(*flags), run(*flags, "--stream")
    assert whole[0] == pieces[0] == 0, pieces[2]
    assert list(_texts(whole[1]).values()) == list(_texts(pieces[1]).values())


@pytest.mark.slow
def test_a_batch_of_prompts_and_a_model_that_drafts_for_itself(run, checkpoint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in ("ab ab", "abc\nabc", "a b c d")))
    flags = (f"--prompts={file}", "--max_new_tokens=9", "--methods=full,knorm", "--budget=8")
    code, one, err = run(*flags)
    assert code == 0, err
    code, two, err = run(*flags, "--batch=2", f"--draft={checkpoint}", "--draft_tokens=2")
    assert code == 0, err
    drafted = {title.replace(f", drafts of {checkpoint}", ""): text for title, text in _texts(two).items()}
    assert drafted == _texts(one) and len(drafted) == 6
    assert " 94%" in two.splitlines()[-2]  # full, of the same weights: all but guesses behind a stop token
    code, _, err = run("--prompt=ab", "--methods=h2o", "--budget=8", "--draft=jacobi", "--max_new_tokens=1")
    assert code == 0, err
    code, other, err = run(*flags[:2], "--methods=h2o", "--budget=8", "--draft=jacobi", "--compare")
    assert code == 0 and "Texts with drafts are " in other.splitlines()[-1], err


def test_prompts_are_the_lines_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\ntwo"}\n')
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["one\ntwo"]
    for text, said in (('{"text": "x"}', 'a.jsonl, line 1: expected {"prompt": "some text"}'), ("", "has no prompts")):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_prompts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "one of --prompt=TEXT and --prompts=FILE says what to write behind."),
        (("--prompt=a", "--prompts=b"), "one of --prompt=TEXT and --prompts=FILE says what to write behind."),
        (("--prompts=/nowhere",), "--prompts: /nowhere: No such file or directory."),
        (("--prompt=a", "--max_new_tokens=0"), "--max_new_tokens must be at least 1, got 0."),
        (("--prompt=a", "--stream", "--batch=2"), "--stream shows one text at a time, got --batch=2."),
        (("--prompt=a", "--compare"), "--compare and --draft_tokens are about --draft, which is not given."),
        (("--prompt=a", "--temperature=-1"), "--temperature must be at least 0, got -1.0."),
        (
            ("--prompt=a", "--max_new_tokens=300"),
            "a prompt of {} tokens with 300 new ones is more than the 256 positions of tiny: lower --max_new_tokens.",
        ),
        (
            ("--prompt=a", "--draft=nobody"),
            "--draft is neither ngram nor jacobi, and as a model: Model 'nobody' does not exist",
        ),
    ],
)
def test_bad_input_is_one_line(run, flags, message):
    code, out, err = run(*flags)
    assert code == 2 and out in ("", "--- full\n") and err.count("\n") == 1
    for part in message.split("{}"):
        assert part in err
