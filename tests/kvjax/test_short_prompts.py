"""Prompts shorter than what a method always keeps, and budgets larger than the prompt."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from experiments.methods import load_method
from kvjax import methods, scores
from kvjax.budget import budget_rows, budget_slots
from kvjax.segments.slots import CLOSED
from kvjax.transforms.layer_budgets import split_budget
from tests.fake_calibrations import Words, calibrate
from tests.kvjax import table_decoder, tiny_model
from tests.kvjax.conformance import positions
from tests.kvjax.slot_arrays import seen_of, slots_cache
from tests.quick_jit import quick_jit

STEP = table_decoder.decoder(table_decoder.tables())
TOKENS = jnp.int32(np.random.default_rng(0).permutation(512)[: 3 * 64].reshape(3, 64))
LENGTHS = (31, 5, 64)  # the last one fills the batch


def test_a_fraction_never_falls_below_what_is_always_kept():
    prompts = jnp.arange(1, 101)
    rows = budget_rows(0.25, prompts, 100, 8)
    np.testing.assert_array_equal(rows, np.maximum(8, np.arange(1, 101) // 4))
    assert [budget_slots(0.25, n, 8) for n in (1, 31, 32, 36, 100)] == [8, 8, 8, 9, 25]
    assert budget_slots(5, 100, 8) == 5  # a count is checked when a method is built


METHODS = {
    "snapkv": lambda: methods.snapkv(0.25, window=32),
    "pyramidkv": lambda: methods.pyramidkv(0.25, window=6, beta=4),
    "adakv": lambda: methods.adakv_snapkv(0.25, window=8, page=4),
    "streamingllm": lambda: methods.streamingllm(0.25, sinks=4),
    "d2o": lambda: methods.d2o(0.25, whole=(-1,)),
}
FAST = [("snapkv", None), ("pyramidkv", 16), ("adakv", None)]


@functools.cache
def _programs(name):
    transform = METHODS[name]()

    def read(tokens, lengths, cache, chunk):
        return kvjax.prefill(STEP, transform, tokens, lengths, cache, room=2, chunk=chunk)

    def more(run, token):
        ones = jnp.ones(token.shape[0], jnp.int32)
        return kvjax.extend(STEP, transform, run, token, ones)[0]

    return quick_jit(read, static_argnames="chunk"), quick_jit(more)


def _runs(name, rows, slots, chunk):
    read, more = _programs(name)
    rows = np.array(rows)
    lengths = jnp.int32(LENGTHS)[rows]
    run = read(TOKENS[rows, :slots], lengths, table_decoder.empty(len(rows)), chunk=chunk)
    return run, more(run, TOKENS[rows, 7:8])


@pytest.mark.parametrize(
    "name, chunk",
    [
        pytest.param(name, chunk, marks=() if (name, chunk) in FAST else pytest.mark.slow)
        for name, chunk in itertools.product(METHODS, [None, 16])
    ],
)
def test_a_short_row_is_the_same_alone_and_beside_a_long_one(name, chunk):
    batch = _runs(name, (0, 1, 2), 64, chunk)
    alone = _runs(name, (0,), LENGTHS[0], chunk)
    for one, many in zip(alone, batch):
        assert positions(one.cache, 0) == positions(many.cache, 0)
        np.testing.assert_allclose(one.logits[0], many.logits[0], rtol=0, atol=1e-5)
        assert np.isfinite(many.logits).all()
    always = {"snapkv": 32, "pyramidkv": 6, "adakv": 8}.get(name, 1)
    for row, n in enumerate(LENGTHS):
        for head in (head for layer in positions(batch[0].cache, row) for head in layer):
            assert set(range(max(n - always, 0), n)) <= set(head)


@pytest.mark.parametrize("sinks, reindex", [(0, False), (3, True)])
def test_every_row_of_a_ring_has_its_own_size(sinks, reindex):
    """8, 4 and 16 slots (a quarter, and no less than the sinks and one), while tokens come one by one or in a call."""
    transform = methods.streamingllm(0.25, sinks=sinks, reindex=reindex)
    sizes = [max(n // 4, sinks + 1) for n in LENGTHS]
    run = quick_jit(
        lambda: kvjax.prefill(
            STEP, transform, TOKENS, jnp.int32(LENGTHS), table_decoder.empty(3), room=9, call_tokens=5
        )
    )()
    more = quick_jit(lambda run, t: kvjax.extend(STEP, transform, run, t, jnp.full(3, t.shape[1]))[0])
    read = np.array(LENGTHS)
    for new in (0, 1, 1, 5, 1, 1):
        if new:
            run = more(run, TOKENS[:, :new])
            read = read + new
        for row, (n, size) in enumerate(zip(read, sizes)):
            want = [*range(sinks), *range(max(n - (size - sinks), sinks), n)]
            assert positions(run.cache, row) == [[want] * 2] * 2
            closed = np.sum(np.asarray(run.cache.layers[0].segments[0].pos[row, 0]) == CLOSED)
            assert closed == 16 - size


SPLITS = [
    kvjax.pyramid(4),
    kvjax.by_variance([0.0, 1.0, 0.3]),
    kvjax.whole_layers((0,)),
    kvjax.by_coverage(np.linspace(0, 1, 9) ** [[1.0], [0.5], [0.1]]),
]


@pytest.mark.parametrize("layers", SPLITS)
@pytest.mark.parametrize("budget", [12, 0.3])
def test_the_split_over_layers_is_a_rows_own(layers, budget):
    lengths = np.arange(1, 65)
    split = split_budget(budget, 3, seen_of(lengths, 64), layers, 2)
    for n in (1, 7, 20, 40, 64):
        alone = split_budget(budget, 3, seen_of([n], n), layers, 2)
        assert [int(rows[0]) for _, rows in alone] == [int(rows[n - 1]) for _, rows in split]
    for slots, rows in split:
        assert slots == np.max(rows)


BUDGETED = {
    **dict.fromkeys(("snapkv", "knorm", "keydiff", "random", "expected_attention", "pyramidkv"), 0),
    **dict.fromkeys(("kvmerger", "locret"), 1),  # a statistic beside every slot
}


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_above_the_prompt_takes_no_more_than_the_full_cache(name):
    lengths = jnp.int32([100])

    def cache(name):
        model = dict(calibrate=calibrate(tiny_model.CONFIG), tokenizer=Words())
        method = load_method(name, budget=512, bindings=(), **model).transform
        step = tiny_model.bind(tiny_model.params())
        read = lambda cache: kvjax.prefill(step, method, jnp.zeros((1, 100), jnp.int32), lengths, cache, room=8)
        return jax.eval_shape(read, tiny_model.empty(1)).cache

    full, stats = cache("full"), BUDGETED[name]
    slots = full.layers[0].segments[0].pos.size * len(full.layers)
    assert kvjax.nbytes(cache(name)) == kvjax.nbytes(full) + 4 * stats * slots


def test_pages_for_a_budget_above_the_prompt_hold_the_prompt():
    read = lambda transform: jax.eval_shape(
        lambda cache: kvjax.prefill(STEP, transform, TOKENS, jnp.int32(LENGTHS), cache, room=0), table_decoder.empty(3)
    ).cache
    for build in (methods.adakv_snapkv, methods.cake):
        exact, more = (kvjax.nbytes(read(build(budget, window=4))) for budget in (64, 4096))
        assert exact == more


def test_what_frees_slots_while_decoding_has_room_for_all_that_may_come():
    """Known from the room: the budget, or the prompt and what follows, whichever is less."""
    evict = kvjax.evict(scores.random(0), 512)
    for transform in (evict, kvjax.ring(512, sinks=2), kvjax.merge(scores.random(0), 512, kvjax.into_nearest())):
        for room, slots in ((None, 512), (10, 30), (1000, 512)):
            k = np.ones((1, 2, 20, 4))
            cache, _ = transform.init(slots_cache(k, (20,)), seen_of((20,), 20, room=room))
            assert cache.layers[0].segments[0].pos.shape[2] == slots
