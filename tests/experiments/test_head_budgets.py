"""The comparison of storages: real bytes of three caches that answer alike."""

import functools

import numpy as np
import pytest

import kvjax
from experiments import head_budgets as program
from kvjax.inspection import held_positions, masked, padded
from tests.experiments import in_process, tiny_checkpoint
from tests.kvjax import tiny_model

compare = functools.partial(in_process.call, program)


def test_the_table_has_three_storages_of_the_same_tokens(tmp_path):
    checkpoint = tiny_checkpoint.write(tmp_path / "tiny")
    bindings = ("--gin_bindings=adakv_snapkv.window = 4", "--gin_bindings=adakv_snapkv.page = 4")
    code, out, err = compare(
        f"--model={checkpoint}", "--methods=adakv_snapkv", "--keep=0.25", "--context=65", *bindings
    )
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.startswith("adakv_snapkv")]
    assert [row[1] for row in rows] == ["masked", "padded", "as"]
    shares = [float(row[-2]) for row in rows]
    assert shares[0] == 1.0 and max(shares[1:]) < 0.45  # pages of four tokens of sixteen round up
    assert all(float(row[-1]) < 1e-4 for row in rows)
    assert "0.25" in out.splitlines()[-2]


def test_bad_input_is_one_line():
    assert compare("--context=1")[2] == "error: --context must be at least 2 tokens, got 1.\n"
    assert compare("--output_dir=out")[0] == 2


def test_bytes_of_masked_and_padded_caches_by_hand():
    config = tiny_model.CONFIG
    out = tiny_model.bind(tiny_model.params())(
        tiny_model.prompt(1, 12), np.arange(12)[None], tiny_model.empty(1), needs=kvjax.Needs(), last_only=True
    )
    held = [[np.arange(3), np.array([0, 4, 5, 9, 11])], [np.arange(7), np.arange(1)]]
    slot = 2 * config.head_dim * 4 + 4
    assert config.num_layers == config.num_kv_heads == 2
    assert kvjax.nbytes(masked(out.cache, held)) == 2 * 2 * 12 * slot + 4
    assert kvjax.nbytes(padded(out.cache, held)) == 2 * 5 * slot + 2 * 7 * slot + 4
    for cache in (masked(out.cache, held), padded(out.cache, held)):
        for layer, expected in zip(held_positions(cache), held):
            for got, want in zip(layer, expected):
                np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="full must be an uncompressed cache of one row"):
        masked(kvjax.Cache(layers=(out.cache.layers[0].replace(segments=()),), length=out.cache.length), [[]])
