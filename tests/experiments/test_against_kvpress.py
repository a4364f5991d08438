"""The comparison with kvpress: what it computes of two answers, and, where kvpress is there, that both agree."""

import functools
import importlib.util

import numpy as np
import pytest

import kvjax
from experiments import against_kvpress as program
from experiments.kvpress_peer import Answer
from kvjax.extras import require
from tests.experiments import in_process

compare = functools.partial(in_process.call, program)
HAS_PEER = importlib.util.find_spec("kvpress") is not None


def test_quality_is_the_nll_of_what_follows_and_the_divergence_from_the_full_cache():
    full, half = np.log([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]), np.log([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
    nll, kl = program.quality(Answer(half, 0, 0.0), Answer(full, 0, 0.0), [0, 1, 0])
    assert nll == pytest.approx(-np.log([0.75, 0.5]).mean())
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    second = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert kl == pytest.approx((first + second) / 2)


def test_bad_flags_are_one_line():
    for flags, message in (
        (["--methods=quest"], "--methods: both have knorm, "),
        (["--following=1"], "--following and --context must be at least 2 tokens"),
        (["--context=10", "--keep=0.01"], "--keep must leave at least one token of 10, got 0.01"),
    ):
        code, _, err = compare(*flags)
        assert code == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.skipif(HAS_PEER, reason="the peer extra is installed")
def test_without_the_extra_its_name_is_one_line(checkpoint):
    code, _, err = compare(f"--model={checkpoint}")
    assert code == 2 and err.endswith(": pip install 'kvjax[peer]'.\n") and len(err.splitlines()) == 1
    with pytest.raises(ImportError, match="kvpress"):
        require("this", "peer", "kvpress")


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.skipif(not HAS_PEER, reason="needs the peer extra")
def test_scores_that_mean_the_same_give_the_same(checkpoint, tmp_path):
    same = "knorm,keydiff,streamingllm,snapkv,tova,h2o"
    flags = (f"--model={checkpoint}", f"--methods={same}", "--context=200", "--following=12", "--keep=0.5")
    code, out, err = compare(*flags, f"--output_dir={tmp_path}")
    assert code == 0, err
    rows = np.genfromtxt(tmp_path / "results.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert len(rows) == 7 and "kvpress" in out
    np.testing.assert_allclose(rows["nll"], rows["kvpress_nll"], atol=1e-3)
    assert (np.abs(rows["kl_between"]) < 1e-4).all() and (rows["kept_tokens"] == rows["kvpress_kept_tokens"]).all()


def test_every_pair_builds_a_transform():
    class WithoutCalibrations:
        tokenizer = type("Tokenizer", (), {"encode": staticmethod(lambda text: [1, 2])})

    for name, pair in program.PAIRS.items():
        if name != "criticalkv":  # measures the model
            assert isinstance(pair.ours(WithoutCalibrations, 100, 0.25), kvjax.CacheTransform)
