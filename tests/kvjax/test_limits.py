"""What a cache has no room for and a decoder does not know is refused; inside jit only the row in question is lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import kvjax
from kvjax import methods
from models import decoder
from models.config import DecoderConfig
from tests.kvjax import tiny_model
from tests.quick_jit import quick_jit

T, LENGTHS = 24, (24, 13)
FULL = methods.full()

GROWING = {
    "full": methods.full,
    "snapkv": lambda: methods.snapkv(12, window=4, kernel=3),
    "adakv": lambda: methods.adakv_snapkv(12, window=4, kernel=3, page=4),
    "kivi": lambda: methods.kivi(4, group=8, residual=8),
    "xkv": lambda: methods.xkv(8, 12),
}
FREEING = {
    "h2o": lambda: methods.h2o(12),
    "tova": lambda: methods.tova(12),
    "d2o": lambda: methods.d2o(12, whole=()),
    "lazyeviction": lambda: methods.lazyeviction(12, window=4),
    "streamingllm": lambda: methods.streamingllm(12, sinks=2),
}


def _step(**limits):
    return decoder.bind(tiny_model.params(), tiny_model.CONFIG, **limits)


def _prefill(transform=FULL, tokens=None, lengths=LENGTHS, room=12, step=None, cache=None, **how):
    tokens = tiny_model.prompt(2, T) if tokens is None else tokens
    cache = tiny_model.empty(2) if cache is None else cache
    return kvjax.prefill(step or _step(), transform, tokens, jnp.asarray(lengths), cache, room=room, **how)


def _extend(run, tokens, transform=FULL, lengths=None, step=None):
    tokens = tiny_model.prompt(2, tokens, seed=1) if isinstance(tokens, int) else tokens
    lengths = jnp.full(2, tokens.shape[1]) if lengths is None else jnp.asarray(lengths)
    return kvjax.extend(step or _step(), transform, run, tokens, lengths)[0]


def _generate(run, count, transform=FULL, step=None, sampler=kvjax.Greedy()):
    how = dict(sampler=sampler, key=jax.random.key(0))
    return kvjax.generate(step or _step(), transform, run, max_new_tokens=count, **how)


@functools.cache
def _abstract(name: str, **how) -> kvjax.Run:
    transform = (GROWING | FREEING)[name]()
    return jax.eval_shape(functools.partial(_prefill, transform, **how))


# --- room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROWING)
def test_what_the_cache_has_no_room_for_is_refused_when_traced(name):
    transform, run = GROWING[name](), _abstract(name)
    call = lambda what, *args: jax.eval_shape(lambda run: what(run, *args, transform), run)
    with pytest.raises(ValueError, match="room for 12 tokens after the prompt, got 13 more: prefill with room=13"):
        call(_generate, 13)
    with pytest.raises(ValueError, match="room for 12 tokens after the prompt, got 14 more"):
        call(_extend, 14)
    used = call(_generate, 9).run
    call_again = lambda what, *args: jax.eval_shape(lambda run: what(run, *args, transform), used)
    assert call_again(_generate, 3).run.room.spent == 12
    with pytest.raises(ValueError, match="of which 9 are spent, got 4 more: prefill with room=13"):
        call_again(_generate, 4)
    with pytest.raises(ValueError, match="of which 9 are spent, got 4 more"):
        call_again(_extend, 4)


@pytest.mark.parametrize("name", FREEING)
def test_calls_longer_than_what_a_method_frees_slots_for_are_refused_when_traced(name):
    transform = FREEING[name]()
    run = _abstract(name)
    jax.eval_shape(lambda run: _generate(run, 100, transform), run)  # any number, one by one
    with pytest.raises(ValueError, match="at most 1, .*got 3: prefill with call_tokens=3"):
        jax.eval_shape(lambda run: _extend(run, 3, transform), run)


def test_a_method_keeps_the_tokens_of_calls_that_it_has_slots_for():
    transform = methods.h2o(12)
    run = _prefill(transform, room=20, call_tokens=5)
    for start in (24, 29):
        run = _extend(run, 5, transform)
        held = kvjax.inspection.held_positions(run.cache, 0)
        assert all(set(range(start, start + 5)) <= set(head.tolist()) for layer in held for head in layer)


@pytest.mark.parametrize("room", [0, 3])
def test_tokens_beyond_the_room_leave_a_row_as_it_was(room):
    one = quick_jit(lambda run, token, lengths: _extend(run, token, lengths=lengths))
    runs = [_prefill(room=room)]
    tokens = tiny_model.prompt(2, room + 2, seed=1)
    for t in range(room + 1):
        alive = jnp.array([1, int(t > 0)])  # the second row comes one token later
        if room == 0:
            with pytest.raises(ValueError, match="room for 0 tokens"):
                one(runs[-1], tokens[:, t : t + 1], alive)
            return
        runs.append(one(runs[-1], tokens[:, t : t + 1], alive))
    last, before = runs[-1], runs[-2]
    assert np.isnan(last.logits[0]).all() and np.isfinite(last.logits[1]).all()
    assert last.cache.length.tolist() == [T + room, LENGTHS[1] + room]
    for a, b in zip(jax.tree.leaves(last.cache), jax.tree.leaves(before.cache)):
        np.testing.assert_array_equal(a[0], b[0])
    # Outside jit, where values are seen, the same call is an error.
    with pytest.raises(ValueError, match="lengths must fit the room that a row has left, got 1 in row 0"):
        _extend(before, tokens[:, :1])


def test_room_is_used_to_its_last_token():
    run = _prefill(room=7)
    run = _extend(run, 3)
    out = _generate(run, 4)
    assert kvjax.inspection.held_positions(out.run.cache, 0)[0][0].tolist() == list(range(T + 7))


@functools.cache
def _read_and_ask(chunk):
    """Compiles a prompt and a padded question: the runs after each."""

    def program(tokens, question):
        run = _prefill(tokens=tokens, chunk=chunk)
        return run, _extend(run, question, lengths=[2, 4])

    return quick_jit(program)


# --- ids and lengths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [800, -1, 2**31 - 1])
def test_unknown_ids_are_refused_by_value_and_row(wrong):
    tokens = tiny_model.prompt(2, T).at[1, 3].set(wrong)
    with pytest.raises(ValueError, match=rf"tokens must be ids from 0 to 799, got {wrong} in row 1"):
        _prefill(tokens=tokens)
    with pytest.raises(ValueError, match=rf"tokens must be ids from 0 to 799, got {wrong} in row 1"):
        _extend(_prefill(), tokens[:, 3:4])


def test_inside_jit_an_unknown_id_costs_its_row_alone():
    right = tiny_model.prompt(2, T)
    prefill = quick_jit(lambda tokens: _prefill(tokens=tokens))
    run, expected = prefill(right.at[1, 3].set(800)), prefill(right)
    assert np.isnan(run.logits[1]).all()
    np.testing.assert_array_equal(run.logits[0], expected.logits[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.cache))
    drawn = _generate(run, 4)
    np.testing.assert_array_equal(drawn.tokens[1], [-1] * 4)
    np.testing.assert_array_equal(drawn.tokens[0], _generate(expected, 4).tokens[0])
    assert drawn.lengths.tolist() == [4, 0]
    error, _ = checkify.checkify(lambda tokens: _prefill(tokens=tokens))(right.at[1, 3].set(800))
    assert "tokens must be ids from 0 to 799, in row 1 are 800" in error.get()


@pytest.mark.parametrize("padding", [0, -1, 800, 2**31 - 1])
def test_padding_may_be_any_number(padding):
    tokens = tiny_model.prompt(2, T)
    padded = tokens.at[1, LENGTHS[1] :].set(padding)
    question = tiny_model.prompt(2, 4, seed=1)
    asked = question.at[0, 2:].set(padding)
    for chunk in (None, 7):
        for run, expected in zip(_read_and_ask(chunk)(padded, asked), _read_and_ask(chunk)(tokens, question)):
            np.testing.assert_array_equal(run.logits, expected.logits)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.cache))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(lengths=[24, 0]), "lengths must be from 1 to the 24 tokens of a row, got 0 in row 1"),
        (dict(lengths=[25, 3]), "lengths must be from 1 to the 24 tokens of a row, got 25 in row 0"),
        (dict(lengths=[[24, 13]]), r"lengths must be an array of 2 integers.*got int32\[1, 2\]"),
        (dict(lengths=[24]), r"lengths must be an array of 2 integers.*got int32\[1\]"),
        (dict(lengths=[24.0, 13.0]), r"lengths must be an array of 2 integers.*got float32\[2\]"),
        (dict(tokens=jnp.zeros((2, 0), jnp.int32)), r"tokens must be at least 1 row of .*, got shape \[2, 0\]"),
        (dict(tokens=[[1, 2], [3, 4]]), r"tokens must be an array of integers \[B, T\], got list"),
        (dict(tokens=jnp.zeros(4, jnp.int32)), r"tokens must be an array of integers \[B, T\], got int32\[4\]"),
        (dict(tokens=jnp.zeros((2, 4))), r"tokens must be an array of integers \[B, T\], got float32\[2, 4\]"),
        (dict(cache=tiny_model.empty(3)), "tokens must have the 3 rows of the cache, got 2"),
        (dict(room=-1), "room must be at least 0 tokens, got -1"),
        (dict(call_tokens=0), "call_tokens must be at least 1, got 0"),
        (dict(chunk=0), "chunk must be at least 1 token or None, got 0"),
    ],
)
def test_impossible_prompts_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        _prefill(**arguments)


def test_a_cache_that_holds_something_is_no_place_for_a_prompt():
    with pytest.raises(ValueError, match="cache must be one without slots, got 36: `extend` goes on"):
        _prefill(cache=_prefill().cache)
    pool = methods.cake(12, window=4, kernel=3, page=4)  # slots that layers share
    with pytest.raises(ValueError, match="cache must be one without slots"):
        jax.eval_shape(lambda run: _prefill(pool, cache=run.cache), jax.eval_shape(functools.partial(_prefill, pool)))


def test_generating_nothing_changes_nothing_and_less_is_refused():
    run = _prefill()
    out = _generate(run, 0)
    assert out.tokens.shape == (2, 0) and out.lengths.tolist() == [0, 0]
    for a, b in zip(jax.tree.leaves(out.run), jax.tree.leaves(run), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        _generate(run, -1)


def test_a_second_call_under_one_key_draws_other_numbers():
    # A decoder that finds every token equally likely: what is drawn shows the key alone.
    flat = lambda *args, **how: (lambda out: out._replace(logits=jnp.zeros_like(out.logits)))(_step()(*args, **how))
    run = _prefill(step=flat, room=40)
    first = _generate(run, 20, step=flat, sampler=kvjax.Sample())
    second = _generate(first.run, 20, step=flat, sampler=kvjax.Sample())
    assert (first.tokens != second.tokens).mean() > 0.9
    assert (first.tokens[0] != first.tokens[1]).mean() > 0.9
    at_once = _generate(run, 40, step=flat, sampler=kvjax.Sample())
    np.testing.assert_array_equal(at_once.tokens, jnp.concatenate([first.tokens, second.tokens], axis=1))


# --- positions ----------------------------------------------------------------------------------------------------

TABLE = dataclasses.replace(
    tiny_model.CONFIG, name="table", max_positions=30, learned_positions=30, rotary_channels=0, norm="layer"
)


def test_positions_that_the_decoder_does_not_have_are_refused():
    step = decoder.bind(tiny_model.params(), dataclasses.replace(tiny_model.CONFIG, max_positions=30))
    assert _prefill(step=step, room=6).logits.shape == (2, 800)
    message = "a prompt of 24 tokens with room for 7 more is more than the 30 positions of the decoder"
    with pytest.raises(ValueError, match=message):
        _prefill(step=step, room=7)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: _prefill(step=step, room=7))
    transform = methods.h2o(12)  # any number of tokens fits the cache
    run = _prefill(transform, step=step, room=6)
    with pytest.raises(ValueError, match="rows may have 30 tokens, the decoder's positions, got 31 in row 0"):
        _generate(run, 7, transform, step)
    inside = quick_jit(lambda run: _generate(run, 9, transform, step))(run)
    assert (inside.tokens[0] >= 0).tolist() == [True] * 7 + [False] * 2  # the seventh is drawn and cannot be read
    assert (inside.tokens[1] >= 0).all()


def test_going_beyond_the_trained_positions_is_explicit_and_ends_at_a_table():
    config = dataclasses.replace(tiny_model.CONFIG, max_positions=30)
    beyond = decoder.bind(tiny_model.params(), config, max_positions=100)
    run, expected = _prefill(step=beyond, room=40), _prefill(room=40)
    np.testing.assert_array_equal(run.logits, expected.logits)
    with pytest.raises(ValueError, match="max_positions must be from 1 to the 30 rows of the model's table"):
        decoder.bind({}, TABLE, max_positions=31)
    with pytest.raises(ValueError, match="max_positions must be from 1, got 0"):
        decoder.bind({}, config, max_positions=0)
    assert decoder.bind({}, TABLE).limits == kvjax.Limits(vocab_size=800, positions=30)


def test_the_default_config_states_a_limit():
    assert DecoderConfig.max_positions == 2048


# --- a saved run --------------------------------------------------------------------------------------------------


def test_a_run_of_another_method_is_not_loaded_for_having_the_same_shapes(tmp_path):
    with_ranks, at_positions = (methods.streamingllm(8, sinks=2, reindex=r) for r in (True, False))
    run = _prefill(with_ranks)
    kvjax.save_run(tmp_path / "run", run, {"method": "streamingllm"})
    like = lambda transform, **how: jax.eval_shape(functools.partial(_prefill, transform, **how))
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert shapes(like(with_ranks)) == shapes(like(at_positions))
    with pytest.raises(ValueError, match=r"another run \(method streamingllm\).*key_rope is 'window'"):
        kvjax.load_run(tmp_path / "run", like(at_positions))
    again = kvjax.load_run(tmp_path / "run", like(with_ranks))
    np.testing.assert_array_equal(_extend(again, 1, with_ranks).logits, _extend(run, 1, with_ranks).logits)


def test_a_loaded_run_has_the_room_that_the_saved_one_had_left(tmp_path):
    run = _generate(_prefill(room=10), 7).run
    kvjax.save_run(tmp_path / "run", run)
    again = kvjax.load_run(tmp_path / "run", jax.eval_shape(lambda: _prefill(room=10)))
    assert again.room == run.room
    with pytest.raises(ValueError, match="of which 7 are spent, got 4 more"):
        _generate(again, 4)


@pytest.mark.parametrize("name", FREEING)
def test_budgets_beyond_prompt_and_room_take_no_more_slots_than_these(name):
    larger = {
        "h2o": lambda n: methods.h2o(n),
        "tova": lambda n: methods.tova(n),
        "d2o": lambda n: methods.d2o(n, whole=()),
        "lazyeviction": lambda n: methods.lazyeviction(n, window=4),
        "streamingllm": lambda n: methods.streamingllm(n, sinks=2),
    }[name]
    transform = larger(1000)
    run = jax.eval_shape(lambda: _prefill(transform, room=12))
    exact = jax.eval_shape(lambda: _prefill(larger(T + 12), room=12))
    assert kvjax.nbytes(run.cache) == kvjax.nbytes(exact.cache) < 1.2 * kvjax.nbytes(_abstract("full").cache)
    jax.eval_shape(lambda run: _generate(run, 12, transform), run)
    with pytest.raises(ValueError, match="room for 12 tokens after the prompt, got 13 more"):
        jax.eval_shape(lambda run: _generate(run, 13, transform), run)


# --- one method, and what was refused once ------------------------------------------------------------------------


def test_a_run_goes_on_with_the_method_that_made_it():
    run = jax.eval_shape(functools.partial(_prefill, methods.h2o(12)))
    for other, name in ((FULL, "identity"), (methods.h2o(13), "evict with a budget of 13")):
        for call in (lambda run: _extend(run, 1, other), lambda run: _generate(run, 1, other)):
            with pytest.raises(ValueError, match=f"made the run, evict with a budget of 12, got {name}"):
                jax.eval_shape(call, run)


def test_a_row_that_was_refused_stays_refused():
    prefill = quick_jit(lambda tokens, lengths: _prefill(tokens=tokens, lengths=lengths))
    extend = quick_jit(lambda run, tokens: _extend(run, tokens))
    tokens, question = tiny_model.prompt(2, T), tiny_model.prompt(2, 4, seed=1)
    expected = extend(prefill(tokens, jnp.array(LENGTHS)), question)
    for lengths, wrong in (([24, 0], 3), ([24, 25], 3), (LENGTHS, 800)):
        run = extend(prefill(tokens.at[1, 3].set(wrong), jnp.array(lengths)), question)
        assert np.isnan(run.logits[1]).all() and (_generate(run, 3).tokens[1] == -1).all()
        np.testing.assert_array_equal(run.logits[0], expected.logits[0])
    refused = extend(prefill(tokens, jnp.array(LENGTHS)), question.at[1, 0].set(-5))
    again = extend(refused, question)
    assert np.isnan(again.logits[1]).all() and again.cache.length.tolist() == [T + 8, LENGTHS[1]]


def test_a_padded_call_needs_room_for_its_tokens_alone():
    run = _prefill(room=2)
    wide = jnp.pad(tiny_model.prompt(2, 2, seed=1), ((0, 0), (0, 6)))
    padded, exact = (_extend(run, tokens, lengths=[2, 1]) for tokens in (wide, wide[:, :2]))
    np.testing.assert_allclose(padded.logits, exact.logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="room for 2 tokens after the prompt, got 3 more"):
        _extend(run, wide, lengths=[3, 1])
