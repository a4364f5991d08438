"""Drafts: what is committed is what would have been read, and speculation draws what `generate` draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from tests.kvjax import table_decoder, tiny_model
from tests.kvjax.cases import CASES
from tests.kvjax.conformance import CLOSE, Harness, assert_same_run
from tests.kvjax.test_conformance import _TWINS
from tests.quick_jit import quick_jit

BY_NAME = {case.name: case for case in CASES}
EVERY = [name for name in BY_NAME if name not in _TWINS]
FAST = ["int4", "h2o"]  # packed blocks; statistics of slots, rewritten at every call
CALL = 4

for_each = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
)


@functools.cache
def _programs(name: str):
    """A run after a prefill, and how it goes on: extended, or by a draft of which a part is committed."""
    h = Harness(BY_NAME[name], room=20, call_tokens=CALL)
    step = tiny_model.bind(h.params)

    def drafted(run, tokens, count):
        draft = kvjax.peek(step, h.transform, run, tokens)
        return kvjax.commit(h.transform, run, draft, count)

    return h.run, h.extend, quick_jit(drafted), h.params


@for_each
def test_a_commit_of_all_is_extend_of_none_nothing_and_of_some_each_row_its_own(name):
    run, extend, drafted, params = _programs(name)
    tokens = [tiny_model.prompt(2, CALL, seed=seed) for seed in (1, 2, 3)]
    by_extend = extend(params, run, tokens[0], jnp.array([0, 0]))
    by_draft = drafted(run, tokens[0], jnp.array([0, 0]))  # empty slots may hold something else; it goes on from there
    np.testing.assert_array_equal(by_draft.logits, run.logits)
    assert_same_run(by_draft, by_extend)
    if name != "d2o":  # whose first call, of any length, drops some of what its prefill kept
        assert_same_run(by_draft, run)
    for given, count in zip(tokens, ((2, 4), (3, 0), (4, 1))):
        by_draft = drafted(by_draft, given, jnp.array(count))
        by_extend = extend(params, by_extend, given, jnp.array(count))
        assert by_draft.cache.length.tolist() == by_extend.cache.length.tolist()
    assert_same_run(by_draft, by_extend)
    for x, y in zip(jax.tree.leaves(by_draft), jax.tree.leaves(by_extend), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert drafted._cache_size() == 1


STEP = table_decoder.decoder(table_decoder.tables())
LENGTHS, T, NEW = (9, 5), 9, 12


def _prompt(rows=slice(None)):
    return jnp.int32(table_decoder.distinct_tokens(2, T))[rows], jnp.array(LENGTHS)[rows]


def _drawn(drafter=None, sampler=kvjax.Greedy(), seed=0, transform=methods.full(), stop_tokens=(), rows=slice(None)):
    tokens, lengths = _prompt(rows)

    def program(tokens, cache, key):
        run = kvjax.prefill(STEP, transform, tokens, lengths, cache, room=NEW, call_tokens=4)
        how = dict(max_new_tokens=NEW, sampler=sampler, key=key, stop_tokens=stop_tokens)
        if drafter is None:
            return kvjax.generate(STEP, transform, run, **how)
        state = drafter.start(tokens, lengths, room=NEW)
        return kvjax.speculate(STEP, transform, run, drafter, state, **how)

    return quick_jit(program)(tokens, table_decoder.empty(tokens.shape[0]), jax.random.key(seed))


def _same_tokens(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_array_equal(a.run.cache.length, b.run.cache.length)
    np.testing.assert_allclose(a.run.logits, b.run.logits, **CLOSE)


class Oracle:
    """Guesses from a list, of which some entries are wrong: rows accept different numbers."""

    def __init__(self, right: np.ndarray, wrong_every: tuple[int, ...], tokens: int = 3):
        place = np.arange(right.shape[1])
        spoiled = [np.where((place + 1) % every == 0, (row + 1) % 30, row) for row, every in zip(right, wrong_every)]
        self.text, self.tokens = jnp.int32(np.pad(np.stack(spoiled), ((0, 0), (0, 8)))), tokens

    def start(self, tokens, lengths, *, room):
        return jnp.zeros(tokens.shape[0], jnp.int32)

    def propose(self, state, token, draw):
        place = state[:, None] + 1 + jnp.arange(self.tokens)
        return jnp.take_along_axis(self.text, place, axis=1), jnp.full(token.shape, self.tokens, jnp.int32)

    def keep(self, state, tokens, count, drawn):
        return state + count


def test_rows_that_accept_different_numbers_draw_what_each_draws_without_drafts():
    warm = kvjax.Sample(temperature=3.0, top_k=20)
    free = _drawn(sampler=warm)
    stop = (int(free.tokens[0, 6]),)
    plain = _drawn(sampler=warm, stop_tokens=stop)
    out = _drawn(Oracle(np.asarray(free.tokens), (5, 3)), warm, stop_tokens=stop)
    _same_tokens(out, plain)
    assert int(out.calls) < NEW and out.accepted[0] / out.drafted[0] != out.accepted[1] / out.drafted[1]


@pytest.mark.slow
def test_a_batch_with_drafts_is_its_rows_alone():
    drafter = kvjax.NGram(tokens=3, shortest=1)
    both = _drawn(drafter)
    alone = _drawn(drafter, rows=slice(0, 1))
    np.testing.assert_array_equal(both.tokens[:1], alone.tokens)
    assert both.accepted[0] == alone.accepted[0]


@pytest.mark.parametrize("sampler", [kvjax.Greedy(), pytest.param(kvjax.Sample(2.0), marks=pytest.mark.slow)])
def test_drafts_of_a_decoder_over_a_smaller_cache_change_no_token(sampler):
    small = kvjax.bind(STEP, methods.streamingllm(6, sinks=1), empty_cache=table_decoder.empty)
    out = _drawn(kvjax.DraftModel(small, tokens=3), sampler)
    _same_tokens(out, _drawn(sampler=sampler))
    assert 0 < out.accepted.sum() <= out.drafted.sum()


@pytest.mark.parametrize("sampler", [kvjax.Greedy(), pytest.param(kvjax.Sample(2.0), marks=pytest.mark.slow)])
def test_jacobi_decoding_changes_no_token(sampler):
    _same_tokens(_drawn(kvjax.Jacobi(tokens=3), sampler), _drawn(sampler=sampler))


def test_n_grams_go_on_with_what_followed_the_longest_and_then_latest_match():
    text = jnp.int32([[1, 2, 3, 9, 2, 3, 8, 2, 0], [4, 5, 4, 5, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    drafter = kvjax.NGram(tokens=4, longest=3, shortest=2)
    state = drafter.start(text, jnp.array([8, 5, 9]), room=4)
    guesses, count = drafter.propose(state, jnp.int32([3, 5, 1]), None)
    assert count.tolist() == [4, 4, 0]
    assert guesses[0].tolist() == [8, 2, 3, 8]  # behind the later "2 3", and again from there
    assert guesses[1].tolist() == [4, 5, 4, 5]
    kept = drafter.keep(state, jnp.int32([[3, 8, 7, 7, 7]] * 3), jnp.array([2, 0, 5]), None)
    assert kept.tokens[0, 8:].tolist() == [3, 8, 0, 0, 0] and kept.length.tolist() == [10, 5, 14]


TABLE = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.25, 0.25, 0.5]])  # p(next | last)
GUESS = np.array([[0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]])


def _markov(table):
    """A decoder whose logits are those of its last token."""

    def step(tokens, positions, cache, *, needs, last_only):
        B, T = tokens.shape
        zeros = jnp.zeros((B, 1, T, 2))
        rope = kvjax.Rope.from_base(10.0, 2)
        layers = tuple(layer.append(zeros, zeros, positions, rope) for layer in cache.layers)
        logits = jnp.log(jnp.float32(table))[tokens]
        new = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        if last_only:
            logits = jnp.take_along_axis(logits, jnp.maximum(new - 1, 0)[:, None, None], axis=1)
        queries = kvjax.Queries(jnp.zeros((B, 0, 1, 2)), positions[:, :0], rope)
        seen = (kvjax.LayerObservation(queries, jnp.zeros((B, 0, 1)), jnp.int32(0)),)
        return kvjax.StepOutput(logits, cache.replace(layers=layers, length=cache.length + new), seen)

    return kvjax.bind(
        step, methods.full(), empty_cache=lambda batch: kvjax.empty_cache(
            batch=batch, layers=1, kv_heads=1, head_dim=2, slots=0
        )
    )


def test_sampled_speculation_has_the_decoders_distribution():
    B, new = 20000, 4
    lm, drafter = _markov(TABLE), kvjax.DraftModel(_markov(GUESS), tokens=2)
    tokens, lengths = jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32)

    @quick_jit
    def program(key):
        run = lm.prefill(tokens, lengths, room=new)
        return lm.speculate(run, drafter, drafter.start(tokens, lengths, room=new), new, kvjax.Sample(), key)

    out = program(jax.random.key(3))
    index = np.asarray(out.tokens) @ 3 ** np.arange(new)[::-1]
    seen = np.bincount(index, minlength=3**new)
    expected = np.zeros((3,) * new)
    for path in np.ndindex(*expected.shape):
        expected[path] = np.prod([TABLE[a, b] for a, b in zip((0, *path), path)])
    expected = expected.ravel() * B
    chi2 = np.sum((seen - expected) ** 2 / expected)
    assert chi2 < 134  # 80 degrees of freedom: exceeded once in ten thousand times
    assert 0.3 < float(out.accepted.sum() / out.drafted.sum()) < 0.9


def _bound(transform=methods.full()):
    lm = kvjax.bind(STEP, transform, empty_cache=table_decoder.empty)
    return lm, lm.prefill(*_prompt(), room=8, call_tokens=4)


def test_two_calls_draw_what_one_draws():
    lm, run = _bound()
    drafter = kvjax.NGram(tokens=3, shortest=1)
    state = drafter.start(*_prompt(), room=8)

    @quick_jit
    def program(run, state):
        first = lm.speculate(run, drafter, state, 3)
        return first, lm.speculate(first.run, drafter, first.drafts, 5), lm.speculate(run, drafter, state, 8)

    first, second, whole = program(run, state)
    np.testing.assert_array_equal(jnp.concatenate([first.tokens, second.tokens], axis=1), whole.tokens)
    np.testing.assert_array_equal(second.drafts.tokens, whole.drafts.tokens)


def test_truncate_takes_back_what_was_read_and_its_room():
    lm, run = _bound()
    given = jnp.int32(table_decoder.distinct_tokens(2, 4, seed=1))
    longer, logits = lm.extend(run, given, jnp.array([4, 4]))
    back = lm.truncate(longer, run.cache.length + jnp.array([0, 2]), jnp.stack([run.logits[0], logits[1, 1]]))
    again, _ = lm.extend(back, given[:, ::-1], jnp.array([4, 4]))
    direct, _ = lm.extend(run, given, jnp.array([0, 2]))
    np.testing.assert_allclose(back.logits, direct.logits, **CLOSE)
    direct, _ = lm.extend(direct, given[:, ::-1], jnp.array([4, 4]))
    assert_same_run(again, direct)
    with pytest.raises(ValueError, match="from the 5 tokens of the prompt to the 9 that were read, got 4 in row 1"):
        lm.truncate(longer, jnp.array([9, 4]), logits[:, 0])


@pytest.mark.parametrize(
    "transform, said",
    [
        (methods.h2o(6), "acts on them"),
        (kvjax.at_prefill_end(methods.streamingllm(6, sinks=1, reindex=False)), "into a ring"),
        (methods.knorm(6), None),
        (kvjax.quantize(8, key_group=4, value_group=4, residual=4), "slots of their own"),
    ],
)
def test_truncate_refuses_what_has_no_way_back(transform, said):
    lm, run = _bound(transform)
    if said is None:
        assert lm.truncate(run, run.cache.length, run.logits).cache.length.tolist() == list(LENGTHS)
        return
    with pytest.raises(ValueError, match=said):
        lm.truncate(run, run.cache.length, run.logits)


def test_impossible_drafts_are_refused_by_name():
    lm, run = _bound()
    tokens = jnp.int32(table_decoder.distinct_tokens(2, 4, seed=1))
    draft = lm.peek(run, tokens, jnp.array([4, 2]))
    for count, said in (((4, 3), "2 tokens, got 3 in row 1"), ((-1, 0), "got -1 in row 0")):
        with pytest.raises(ValueError, match=said):
            lm.commit(run, draft, jnp.array(count))
    with pytest.raises(ValueError, match="count must be 2 integers"):
        lm.commit(run, draft, jnp.array([1]))
    with pytest.raises(ValueError, match="draft must be read behind this run"):
        lm.commit(lm.commit(run, draft, jnp.array([1, 1])), draft, jnp.array([1, 1]))
    with pytest.raises(ValueError, match="made the run"):
        kvjax.peek(STEP, methods.h2o(4), run, tokens)
    twice = lm.peek(run, jnp.concatenate([tokens] * 3, axis=1))
    with pytest.raises(ValueError, match="room for 8 tokens"):
        lm.commit(run, twice, jnp.array([9, 0]))
    for build, said in ((lambda: kvjax.NGram(tokens=0), "tokens"), (lambda: kvjax.NGram(shortest=5), "shortest")):
        with pytest.raises(ValueError, match=f"{said} must be"):
            build()


@pytest.mark.slow
def test_two_hundred_greedy_tokens_of_a_real_model_are_those_without_drafts(smollm2):
    """Rounding decides between tokens only where two are as likely to the last bits."""
    text = "Write a list of the planets, one a line, with a sentence about each. Repeat the list twice."
    tokens = jnp.int32([smollm2.tokenizer.encode(text)])
    lengths = jnp.array([tokens.shape[1]])
    for transform in (methods.full(), methods.snapkv(budget=12, window=4, kernel=3)):
        lm = kvjax.bind(smollm2.step, transform)
        run = lm.prefill(tokens, lengths, room=200, call_tokens=8)
        plain = jax.jit(kvjax.BoundMethod.generate, static_argnums=2)(lm, run, 200)
        for drafter in (kvjax.NGram(), kvjax.Jacobi()):
            state = drafter.start(tokens, lengths, room=200)
            out = jax.jit(kvjax.BoundMethod.speculate, static_argnums=4)(lm, run, drafter, state, 200)
            np.testing.assert_array_equal(out.tokens, plain.tokens)
            assert out.accepted[0] > 0 and int(out.calls) < 200
