"""The speed benchmark: what its rows say, with and without the peer. Nothing here asserts a time."""

import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from experiments import bench_decode as program
from experiments.stopwatch import in_turn
from experiments.transformers_peer import TransformersPeer, huggingface_tensors
from models import load_model
from models.decoder import forward, prompt_cache
from models.weights import build_params
from tests.experiments import in_process, tiny_checkpoint

NEW_TOKENS = 6

bench = functools.partial(in_process.call, program)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A run without the peer, on two lengths, the longer one beyond what the model takes."""
    folder = tmp_path_factory.mktemp("out") / "bench"
    with mock.patch.object(program, "TransformersPeer", side_effect=ImportError("No module named 'torch'")):
        code, out, err = bench(
            f"--model={checkpoint}",
            "--lengths=40,100000",
            f"--new_tokens={NEW_TOKENS}",
            "--repeats=1",
            "--methods=int4,snapkv",
            "--keep=0.5",
            f"--output_dir={folder}",
        )
    assert code == 0, err
    return out, json.loads((folder / "bench.json").read_text())


LONGEST = tiny_checkpoint.MAX_POSITIONS - NEW_TOKENS


def test_rows_are_the_full_cache_per_length_then_all_methods(finished):
    _, report = finished
    assert [(s["name"], s["prompt_tokens"]) for s in report["speeds"]] == [
        ("full", 40),
        ("full", LONGEST),  # cut to what the model was trained for
        ("full", LONGEST),
        ("int4", LONGEST),
        ("snapkv", LONGEST),
    ]
    for s in report["speeds"]:
        assert s["prefill_seconds"] > 0 and s["decode_tokens_per_second"] > 0
        assert len(s["tokens"]) == NEW_TOKENS


def test_bytes_and_bounds_are_what_they_say(finished):
    _, report = finished
    bandwidth = report["ceilings"]["gigabytes_per_second"] * 1e9
    for s in report["speeds"]:
        if s["name"] == "full":  # 2 layers, 2 heads: keys and values of 32 floats and a position; a length
            assert s["cache_bytes"] == 2 * 2 * (s["prompt_tokens"] + NEW_TOKENS) * (2 * 32 * 4 + 4) + 4
        read = report["weight_bytes"] + s["read_bytes"]
        assert s["decode_bound_tokens_per_second"] == pytest.approx(bandwidth / read)
    full, int4, snapkv = (s["cache_bytes"] for s in report["speeds"][2:])
    assert int4 < full / 2 and snapkv < full * 0.6


def test_tokens_are_those_of_greedy_decoding_without_a_cache(finished, checkpoint):
    _, report = finished
    model = load_model(str(checkpoint))
    ids, lengths = program.read_prompt(model, [40], NEW_TOKENS)
    assert lengths == [40] and len(ids) == 40
    tokens = report["speeds"][0]["tokens"]
    logits, _ = forward(
        model.params,
        model.config,
        jnp.asarray([ids + tokens]),
        jnp.arange(40 + NEW_TOKENS)[None],
        prompt_cache(model.config, 1),
    )
    assert tokens == jnp.argmax(logits[0, 39:-1], axis=-1).tolist()


def test_the_table_says_that_the_peer_is_missing(finished):
    out, report = finished
    assert "No peer: No module named 'torch'" in out and "extra `peer`" in out
    for s in report["speeds"]:
        assert f"{s['prefill_seconds']:.2f} s" in out and f"{s['decode_tokens_per_second']:.1f} tok/s" in out


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--lengths=512,many", "--lengths must be whole numbers of at least 1, got '512,many'"),
        ("--lengths=0", "--lengths must be whole numbers of at least 1, got '0'"),
        ("--lengths=", "--lengths must be whole numbers"),
        ("--new_tokens=0", "--new_tokens must be at least 1, got 0"),
        ("--new_tokens=256", "--new_tokens must be below the model's 256, got 256"),
        ("--repeats=0", "--repeats must be at least 1, got 0"),
        ("--batch=0", "--batch must be at least 1, got 0"),
        ("--mesh=data:3", "mesh data:3 has 3 places, but there are 8 devices"),
        ("--keep=0", "--keep must be in (0, 1], got 0.0"),
        ("--methods=magic", "unknown method 'magic'"),
        ("--model=/nowhere", "'/nowhere' does not exist"),
    ],
)
def test_bad_input_is_one_line(checkpoint, flag, says):
    code, out, err = bench(*([] if flag.startswith("--model") else [f"--model={checkpoint}"]), flag)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


@pytest.mark.slow
def test_untrained_weights_write_the_same_on_a_mesh(checkpoint, tmp_path):
    """Two rows of a shape, on one device and on eight."""
    reports = []
    for index, more in enumerate(([], ["--mesh=data:2,seq:2,model:2"])):
        flags = [f"--model={checkpoint}", "--random_weights", "--lengths=80", "--new_tokens=4", "--repeats=1", *more]
        code, out, err = bench(*flags, "--methods=int4", "--batch=2", f"--output_dir={tmp_path}/{index}")
        assert code == 0 and "No peer" in out, err
        reports.append(json.loads((tmp_path / str(index) / "bench.json").read_text()))
    alone, split = ([(s["name"], s["prompt_tokens"], s["tokens"]) for s in report["speeds"]] for report in reports)
    assert alone == split and [name for name, *_ in alone] == ["full", "full", "int4"]
    assert all(len(tokens) == 4 for *_, tokens in alone)
    for report in reports:
        full = report["speeds"][0]
        assert full["cache_bytes"] == 2 * (2 * 2 * (80 + 4) * (2 * 32 * 4 + 4) + 4)
        bound = 2 * report["ceilings"]["gigabytes_per_second"] * 1e9
        assert full["decode_bound_tokens_per_second"] == pytest.approx(
            bound / (report["weight_bytes"] + full["read_bytes"])
        )


def test_flops_of_a_prefill_are_those_of_its_products(checkpoint):
    """Against XLA's own count for the same products, written out densely; half of the attention is masked."""
    config, T = load_model(str(checkpoint)).config, 64
    N, K, H, D, F = config.num_heads, config.num_kv_heads, config.head_dim, config.width, config.ffn_width

    def count(*shapes):
        a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
        return jax.jit(jnp.matmul).lower(a, b).compile().cost_analysis()["flops"]

    matrices = [((T, D), (D, (N + 2 * K) * H)), ((T, N * H), (N * H, D)), ((T, D), (D, 2 * F)), ((T, F), (F, D))]
    attention = [((N, T, H), (N, H, T)), ((N, T, T), (N, T, H))]
    expected = config.num_layers * (
        sum(count(*m) for m in matrices) + sum(count(*m) for m in attention) * (T + 1) / (2 * T)
    ) + count((1, D), (D, config.vocab_size))
    # XLA counts a product of length n as 2 n operations, as we do.
    assert program.prefill_flops(config, T) == pytest.approx(expected, rel=1e-6)


def test_in_turn_warms_up_once_and_takes_medians():
    calls = []

    def candidate(name, times):
        times = iter(times)

        def run():
            calls.append(name)
            return next(times), 1.0, name

        return run

    timed = in_turn({"a": candidate("a", [99, 3, 1, 2]), "b": candidate("b", [99, 5, 5, 8])}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert timed == {"a": (2, 1.0, "a"), "b": (5, 1.0, "b")}


def test_weights_go_back_to_the_names_they_came_from(checkpoint):
    model = load_model(str(checkpoint))
    again = build_params(model.config, huggingface_tensors(model).__getitem__, jnp.float32)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), model.params, again)
    assert all(jax.tree.leaves(same))


def test_the_peer_refuses_what_is_no_llama(checkpoint):
    model = load_model(str(checkpoint))
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, post_norms=True))
    with pytest.raises(ValueError, match="tiny is not a plain Llama"):
        TransformersPeer(other, threads=1)


@pytest.mark.peer
def test_the_peer_is_the_same_model(checkpoint):
    pytest.importorskip("torch", reason="needs the extra peer")
    pytest.importorskip("transformers", reason="needs the extra peer")
    model = load_model(str(checkpoint))
    ids, _ = program.read_prompt(model, [100], NEW_TOKENS)
    peer = TransformersPeer(model, threads=1)
    logits, _ = forward(
        model.params, model.config, jnp.asarray([ids]), jnp.arange(len(ids))[None], prompt_cache(model.config, 1)
    )
    # Two float32 implementations of two layers, logits of order 1.
    np.testing.assert_allclose(peer.logits(ids), logits[0, -1], atol=1e-4)
    ours = program.Ours(model, program.load_method("full", budget=0.5), [ids], NEW_TOKENS)
    assert peer(ids, NEW_TOKENS)[2] == ours()[2]
    assert ours.cache_bytes == kvjax.nbytes(prompt_cache(model.config, 1)) + 2 * 2 * (100 + NEW_TOKENS) * 260
