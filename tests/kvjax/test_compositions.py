"""Transforms of different families in every order: they run, or are refused when composed, with the reason."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import methods
from tests.fake_calibrations import calibrate
from tests.kvjax import tiny_model
from tests.quick_jit import quick_jit

B, T, ROOM = 2, 24, 10
_data = lambda recipe: calibrate(tiny_model.CONFIG)(recipe, None)
FLAGSHIPS = {
    "evict": lambda: methods.snapkv(16, window=4, kernel=3),
    "same_tokens": lambda: kvjax.at_prefill_end(kvjax.evict(kvjax.scores.last_query_attention(), 16)),
    "ring": lambda: methods.streamingllm(16, sinks=2, reindex=False),
    "paged": lambda: methods.adakv_snapkv(12, window=4, kernel=3, page=8),
    "quantize": lambda: kvjax.quantize(4, key_group=8, value_group=8, residual=8),
    "cast": lambda: methods.fp8(),
    "project": lambda: methods.matryoshka_pca(_data("matryoshka_pca"), value_rank=8),
    "joint": lambda: methods.cskv(_data("cskv"), window=8),
    "prune": lambda: methods.think(window=4),
    "split": lambda: methods.duoattention(_data("duoattention"), sinks=2, recent=6),
}
# What each may follow, the first of a chain aside.
ALLOWED = {
    "evict": {"same_tokens", "cast"},
    "same_tokens": {"evict", "cast"},
    "ring": {"evict", "same_tokens", "cast"},
    "paged": {"evict", "same_tokens", "cast"},
    "quantize": {"evict", "same_tokens", "paged", "project", "joint", "prune", "split", "cast"},
    "cast": {"evict", "same_tokens", "ring", "paged", "project", "prune", "split"},
    "project": {"evict", "same_tokens", "cast"},
    "joint": {"same_tokens", "cast"},
    "prune": {"evict", "same_tokens", "cast"},
    "split": {"evict", "same_tokens", "cast"},
}
PAIRS = list(itertools.permutations(FLAGSHIPS, 2))


def _run(transform):
    """A padded batch, read and then continued by two tokens; bytes promised and taken."""

    def program(params, tokens, question, cache):
        step = tiny_model.bind(params)
        lengths = jnp.array([T, 13])
        run = kvjax.prefill(step, transform, tokens, lengths, cache, room=ROOM, call_tokens=3)
        run, _ = kvjax.extend(step, transform, run, question, jnp.array([3, 2]), prompt_slots=T)
        for t in range(2):
            run, _ = kvjax.extend(step, transform, run, question[:, t : t + 1], jnp.ones(2, jnp.int32), prompt_slots=T)
        return run

    args = tiny_model.params(), tiny_model.prompt(B, T), tiny_model.prompt(B, 3, seed=4), tiny_model.empty(B)
    promised = kvjax.nbytes(jax.eval_shape(program, *args).cache)
    run = quick_jit(program)(*args)
    assert kvjax.nbytes(run.cache) == promised
    return run


@pytest.fixture(scope="module")
def alone():
    """Bytes of each flagship by itself, measured when asked for."""
    sizes = {}

    def nbytes(name):
        if name not in sizes:
            sizes[name] = kvjax.nbytes(_run(FLAGSHIPS[name]()).cache)
        return sizes[name]

    return nbytes


@pytest.mark.parametrize("first, second", [(a, b) for a, b in PAIRS if a in ALLOWED[b]])
def test_sensible_orders_run(first, second, alone):
    run = _run(kvjax.chain(FLAGSHIPS[first](), FLAGSHIPS[second]()))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((run.logits, run.cache)))
    assert run.cache.length.tolist() == [T + 5, 13 + 4]
    if second in ("quantize", "cast") and first != "cast":
        assert kvjax.nbytes(run.cache) < alone(first)


@pytest.mark.parametrize("first, second", [(a, b) for a, b in PAIRS if a not in ALLOWED[b]])
def test_other_orders_are_refused_when_composed(first, second):
    with pytest.raises(ValueError, match=r"^\w+ cannot follow \w+: it cannot work on .*\.$"):
        kvjax.chain(FLAGSHIPS[first](), FLAGSHIPS[second]())


def test_the_reason_says_what_is_there():
    with pytest.raises(ValueError) as refused:
        kvjax.chain(methods.kivi(4), methods.snapkv(64))
    assert str(refused.value) == "evict cannot follow quantize: it cannot work on packed codes."
    with pytest.raises(ValueError, match="project_jointly cannot follow evict: .* each head with tokens of its own"):
        kvjax.chain(methods.snapkv(64), methods.cskv(_data("cskv")))
    three = kvjax.chain(methods.snapkv(64), kvjax.chain(methods.fp8(), methods.kivi(4)))
    with pytest.raises(ValueError, match="cannot follow"):
        kvjax.chain(three, methods.think())


def test_what_acts_on_every_token_is_not_followed_by_what_changes_the_slots():
    with pytest.raises(ValueError) as refused:
        kvjax.chain(methods.h2o(64), methods.kivi(4))
    assert str(refused.value) == (
        "quantize cannot follow evict, which still acts after the prompt: it cannot work on packed codes. Wrap it in "
        "at_prefill_end."
    )
    assert kvjax.chain(kvjax.at_prefill_end(methods.h2o(64)), methods.kivi(4)).leaves == "packed"
