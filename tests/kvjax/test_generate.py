"""`generate` and `extend`: stop tokens, lengths, padding, keys, and tokens that are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from tests.kvjax import table_decoder
from tests.kvjax.conformance import positions
from tests.quick_jit import quick_jit

STEP = table_decoder.decoder(table_decoder.tables())
LENGTHS, T, NEW = (9, 5), 9, 12


def _prompt() -> jax.Array:
    return jnp.int32(table_decoder.distinct_tokens(2, T))


def _generate(stop_tokens=(), sampler=kvjax.Greedy(), seed=0, transform=methods.full(), new=NEW):
    def program(tokens, cache, key):
        run = kvjax.prefill(STEP, transform, tokens, jnp.array(LENGTHS), cache, room=NEW)
        return kvjax.generate(
            STEP,
            transform,
            run,
            max_new_tokens=new,
            sampler=sampler,
            key=key,
            stop_tokens=stop_tokens,
        )

    return quick_jit(program)(_prompt(), table_decoder.empty(2), jax.random.key(seed))


@pytest.fixture(scope="module")
def free():
    """What is generated without stop tokens, sampled so that rows do not repeat themselves."""
    return _generate(sampler=kvjax.Sample(temperature=3.0))


def test_without_stop_tokens_every_row_gets_all_its_tokens(free):
    assert free.tokens.shape == (2, NEW) and free.tokens.dtype == jnp.int32
    assert free.lengths.tolist() == [NEW, NEW]
    assert free.run.cache.length.tolist() == [length + NEW for length in LENGTHS]
    assert len(set(free.tokens[0].tolist())) > 4


def test_rows_stop_at_their_own_stop_token_and_repeat_it(free):
    drawn = np.asarray(free.tokens)
    # Tokens that end row 0 at its fourth token and row 1 at its eighth, or where they first occur.
    stops = tuple(int(x) for x in (drawn[0, 3], drawn[1, 7]))
    ends = [int(np.argmax(np.isin(row, stops))) for row in drawn]
    out = _generate(stops, kvjax.Sample(temperature=3.0))
    assert out.lengths.tolist() == [end + 1 for end in ends]
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(out.tokens[row, : end + 1], drawn[row, : end + 1])
        assert (out.tokens[row, end + 1 :] == drawn[row, end]).all()
        # The stop token is in the cache; nothing after it is.
        assert out.run.cache.length[row] == LENGTHS[row] + end + 1
        assert positions(out.run.cache, row)[0][0] == list(range(LENGTHS[row] + end + 1))


def test_a_row_that_has_stopped_keeps_its_logits(free):
    drawn = np.asarray(free.tokens)
    stop = int(drawn[0, 0])
    assert stop not in drawn[1]
    one = _generate((stop,), kvjax.Sample(temperature=3.0))
    short = _generate((), kvjax.Sample(temperature=3.0), new=1)
    assert one.lengths.tolist() == [1, NEW]
    # Two programs: the same sums, fused differently.
    np.testing.assert_allclose(one.run.logits[0], short.run.logits[0], rtol=1e-5, atol=1e-6)


def test_the_key_decides_what_is_drawn(free):
    again = _generate(sampler=kvjax.Sample(temperature=3.0))
    other = _generate(sampler=kvjax.Sample(temperature=3.0), seed=1)
    np.testing.assert_array_equal(again.tokens, free.tokens)
    assert (other.tokens != free.tokens).any()


def _read(transform):
    """A run with room for four tokens, and what feeds it some."""
    read = lambda cache: kvjax.prefill(STEP, transform, _prompt(), jnp.array(LENGTHS), cache, room=4)
    extend = lambda run, tokens, lengths: kvjax.extend(STEP, transform, run, tokens, lengths)
    return quick_jit(read)(table_decoder.empty(2)), quick_jit(extend)


def test_given_tokens_in_one_call_or_one_by_one_give_the_same_logits():
    transform = methods.full()
    forced = jnp.int32(table_decoder.distinct_tokens(2, 4, seed=1))
    run, extend = _read(transform)
    together, logits = extend(run, forced, jnp.array([4, 2]))
    for t in range(4):
        alive = jnp.array([1, int(t < 2)])
        run, one = extend(run, forced[:, t : t + 1], alive)
        np.testing.assert_allclose(logits[0, t], one[0, 0], rtol=1e-5, atol=1e-6)
        if t < 2:
            np.testing.assert_allclose(logits[1, t], one[1, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.logits, together.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run.cache.length, together.cache.length)


def test_a_call_without_tokens_changes_nothing():
    transform = methods.h2o(6)
    run, extend = _read(transform)
    after, _ = extend(run, jnp.zeros((2, 1), jnp.int32), jnp.zeros(2, jnp.int32))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(run)):
        np.testing.assert_array_equal(a, b)
