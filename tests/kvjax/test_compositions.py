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
    "reindex": kvjax.reindex,
    "evict": lambda: methods.snapkv(16, window=4, kernel=3),
    "same_tokens": lambda: kvjax.at_prefill_end(kvjax.evict(kvjax.scores.last_query_attention(), 16)),
    "merge": lambda: kvjax.at_prefill_end(
        kvjax.merge(kvjax.scores.window_attention(4), 12, kvjax.into_nearest(), recent=4, log_count=True)
    ),
    "ring": lambda: methods.streamingllm(16, sinks=2, reindex=False),
    "paged": lambda: methods.adakv_snapkv(12, window=4, kernel=3, page=8),
    "pooled": lambda: methods.cake(12, window=4, kernel=3, page=8),
    "quantize": lambda: kvjax.quantize(4, key_group=8, value_group=8, residual=8),
    "quantize_slots": lambda: kvjax.quantize(4, key_axis="token", key_group=8, value_group=8, residual=0),
    "turboquant": lambda: methods.turboquant(4),
    "correct": lambda: methods.gear(2, group=8, block=16, rank=1),
    "tiers": lambda: kvjax.at_prefill_end(kvjax.split_slots(kvjax.scores.accumulated_attention(), 8, recent=2)),
    "balance": lambda: kvjax.balance_channels(),
    "codebook": lambda: methods.million(_data("million"), 8),
    "rotate": lambda: methods.rotatekv(_data("rotatekv"), sinks=3),
    "cast": lambda: methods.fp8(),
    "project": lambda: methods.matryoshka_pca(_data("matryoshka_pca"), value_rank=8),
    "joint": lambda: methods.cskv(_data("cskv"), window=8),
    "prune": lambda: methods.think(window=4),
    "split": lambda: methods.duoattention(_data("duoattention"), sinks=2, recent=6),
    "share_basis": lambda: methods.xkv(2, 16, 24),
    "merge_layers": lambda: methods.minicache(0),
}
PACKED = {"quantize", "quantize_slots", "turboquant", "correct", "codebook", "rotate"}
# What each may follow, the first of a chain aside.
ALLOWED = {
    "reindex": {"evict", "same_tokens", "merge", "cast"},
    "evict": {"same_tokens", "merge", "cast", "quantize_slots", "reindex"},
    "same_tokens": {"evict", "merge", "cast", "quantize_slots", "reindex"},
    "merge": {"evict", "same_tokens", "cast", "reindex"},
    "ring": {"evict", "same_tokens", "merge", "cast", "quantize_slots", "reindex"},
    "paged": {"evict", "same_tokens", "merge", "cast"},
    "pooled": {"evict", "same_tokens", "merge", "cast"},
    "quantize": {*FLAGSHIPS} - PACKED,
    "quantize_slots": {*FLAGSHIPS} - PACKED,
    "turboquant": {"evict", "same_tokens", "merge", "ring", "split", "tiers", "cast"},
    "correct": {*FLAGSHIPS} - {*PACKED, "ring"},
    "codebook": {"evict", "same_tokens", "merge", "paged", "split", "tiers", "cast"},
    "rotate": {"same_tokens", "cast"},
    "tiers": {"evict", "same_tokens", "merge", "cast", "reindex"},
    "balance": {"evict", "same_tokens", "merge", "cast"},
    "cast": {*FLAGSHIPS} - {*PACKED, "cast", "joint", "reindex"},
    "project": {"evict", "same_tokens", "merge", "cast"},
    "joint": {"same_tokens", "cast"},
    "prune": {"evict", "same_tokens", "merge", "cast"},
    "split": {"evict", "same_tokens", "merge", "cast"},
    "share_basis": {"cast"},
    "merge_layers": {"cast"},
}
PAIRS = list(itertools.permutations(FLAGSHIPS, 2))
# One flagship of every family runs after every other; of the rest, each runs once.
FAMILIES = {"evict", "paged", "quantize", "merge", "project", "split", "share_basis"}
ONCE = {
    ("tiers", "quantize"),
    ("balance", "quantize"),
    ("joint", "quantize"),
    ("prune", "quantize"),
    ("pooled", "quantize"),
    ("merge_layers", "quantize"),
    ("evict", "correct"),
    ("evict", "codebook"),
    ("same_tokens", "rotate"),
    ("same_tokens", "joint"),
    ("evict", "same_tokens"),
    ("evict", "ring"),
    ("project", "cast"),
    ("reindex", "evict"),
    ("reindex", "quantize"),
    *((first, "quantize_slots") for first in ("evict", "merge", "ring", "paged", "pooled", "split", "share_basis")),
    *((first, "turboquant") for first in ("evict", "ring", "split", "tiers")),
    ("quantize_slots", "evict"),
    ("quantize_slots", "ring"),
}
# The others of these run in `make test-all`. What rewrites slots of every kind before what stores or moves them.
FAST = {
    ("merge", "quantize"),
    ("split", "quantize"),
    ("evict", "project"),
    ("evict", "ring"),
    ("cast", "evict"),
    ("split", "turboquant"),
    ("quantize_slots", "evict"),
}


def _program(transform):
    """A padded batch, read and then continued by two tokens, with its arguments."""

    def program(params, tokens, question, cache):
        step = tiny_model.bind(params)
        lengths = jnp.array([T, 13])
        run = kvjax.prefill(step, transform, tokens, lengths, cache, room=ROOM, call_tokens=3)
        run, _ = kvjax.extend(step, transform, run, question, jnp.array([3, 2]))
        for t in range(2):
            run, _ = kvjax.extend(step, transform, run, question[:, t : t + 1], jnp.ones(2, jnp.int32))
        return run

    args = tiny_model.params(), tiny_model.prompt(B, T), tiny_model.prompt(B, 3, seed=4), tiny_model.empty(B)
    return program, args


def _promised(transform) -> int:
    program, args = _program(transform)
    return kvjax.nbytes(jax.eval_shape(program, *args).cache)


@pytest.mark.parametrize("first, second", [(a, b) for a, b in PAIRS if a in ALLOWED[b]])
def test_sensible_orders_compose(first, second):
    assert kvjax.chain(FLAGSHIPS[first](), FLAGSHIPS[second]()).schedule.name


def _marks(pair):
    slow, float8 = pair not in FAST, "cast" in pair
    return [mark for mark, needed in ((pytest.mark.slow, slow), (pytest.mark.float8, float8)) if needed]


@pytest.mark.parametrize(
    "first, second",
    [
        pytest.param(*pair, marks=_marks(pair))
        for pair in PAIRS
        if pair[0] in ALLOWED[pair[1]] and (FAMILIES.issuperset(pair) or pair in ONCE)
    ],
)
def test_sensible_orders_run(first, second):
    transform = kvjax.chain(FLAGSHIPS[first](), FLAGSHIPS[second]())
    program, args = _program(transform)
    run = quick_jit(program)(*args)
    assert kvjax.nbytes(run.cache) == _promised(transform)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((run.logits, run.cache)))
    assert run.cache.length.tolist() == [T + 5, 13 + 4]
    if second in ("quantize", "cast") and first != "cast":
        assert kvjax.nbytes(run.cache) < _promised(FLAGSHIPS[first]())


@pytest.mark.parametrize("first, second", [(a, b) for a, b in PAIRS if a not in ALLOWED[b]])
def test_other_orders_are_refused_when_composed(first, second):
    with pytest.raises(ValueError, match=r"^[\w ]+ cannot follow [\w ]+: it needs .*\.$"):
        kvjax.chain(FLAGSHIPS[first](), FLAGSHIPS[second]())


def test_the_reason_says_what_is_there():
    with pytest.raises(ValueError) as refused:
        kvjax.chain(methods.kivi(4), methods.snapkv(64))
    assert str(refused.value) == "evict cannot follow quantize: it needs slots that are kept and dropped one by one."
    with pytest.raises(ValueError, match="project_jointly cannot follow evict: it needs the same tokens in every head"):
        kvjax.chain(methods.snapkv(64), methods.cskv(_data("cskv")))
    with pytest.raises(ValueError, match="share_basis cannot follow evict: it needs the whole prompt"):
        kvjax.chain(FLAGSHIPS["same_tokens"](), methods.xkv())
    with pytest.raises(ValueError, match="ring cannot follow evict: it needs the whole prompt"):
        kvjax.chain(methods.snapkv(64), methods.streamingllm(32))  # its newest tokens would not follow each other
    assert kvjax.chain(methods.snapkv(64), kvjax.reindex(), methods.streamingllm(32, reindex=False)).schedule.name
    three = kvjax.chain(methods.snapkv(64), kvjax.chain(methods.fp8(), methods.kivi(4)))
    with pytest.raises(ValueError, match="cannot follow"):
        kvjax.chain(three, methods.think())


def test_what_acts_on_every_token_is_not_followed_by_what_changes_the_slots():
    with pytest.raises(ValueError) as refused:
        kvjax.chain(methods.h2o(64), methods.kivi(4))
    assert str(refused.value) == (
        "quantize cannot follow evict, which still acts while tokens come: it needs slots that are kept and dropped "
        "one by one. Wrap it in at_prefill_end."
    )
    assert "slots" in kvjax.chain(kvjax.at_prefill_end(methods.h2o(64)), methods.kivi(4)).schedule.order.loses
    assert kvjax.chain(methods.h2o(64), kvjax.quantize(4, key_axis="token", residual=0)).schedule.acts_in
