"""What was read once is attached, moved, cut, put together, read again in parts and forked: identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods, reuse
from kvjax.segments import TemperedSegment
from models.decoder import bind, first_layers, layer_rope
from tests.kvjax import tiny_model
from tests.kvjax.cases import CASES
from tests.kvjax.conformance import CLOSE
from tests.quick_jit import quick_jit

T, LENGTHS, ROOM = 24, (24, 13), 6
BY_NAME = {case.name: case for case in CASES}
TRANSFORMS = {name: case.build() for name, case in BY_NAME.items()}
ROPES = [layer_rope(tiny_model.CONFIG, index) for index in range(tiny_model.CONFIG.num_layers)]
_RINGS = ("streamingllm", "duoattention", "razorattention")
_BASES = ("mikv", "think", "matryoshka", "kqsvd", "turboquant")
_CODES = ("int", "kivi", "gear", "fp8", "million", "alisa", "zipcache", "zipvl")


def _why_not_moved(name):
    if name.startswith(_RINGS):
        return "A ring knows its first tokens"
    if "quest" in name:
        return "Pages under an index"
    if name.startswith(_BASES):
        return "Coordinates of rotated keys"
    return "keys that are codes" if name.startswith(_CODES) or "_int" in name else None


NOT_MOVED = {name: why for name in BY_NAME if (why := _why_not_moved(name))}
MERGED = ("razorattention", "merge_counted_int4")  # slots that count for several tokens
NOT_BEHIND = {
    "kvzip": "reads the prompt again",
    "kvzip_int4": "reads the prompt again",
    **dict.fromkeys(("mikv", "zipcache", "zipvl"), "slots that each row has of its own"),
}


def cases(names, fast=()):
    return pytest.mark.parametrize(
        "name", [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
    )


def _prefill(params, transform, tokens, lengths, room=ROOM):
    how = dict(room=room, call_tokens=2)
    empty = tiny_model.empty(tokens.shape[0])
    return kvjax.prefill(tiny_model.bind(params), transform, tokens, jnp.asarray(lengths), empty, **how)


def _next(params, transform, run):
    """Logits after two more tokens of the first row and one of the others."""
    more = tiny_model.prompt(run.logits.shape[0], 2, seed=3)
    lengths = jnp.where(jnp.arange(run.logits.shape[0]) == 0, 2, 1)
    return kvjax.extend(tiny_model.bind(params), transform, run, more, lengths)[0].logits


def _where(lengths=LENGTHS):
    index = jnp.arange(T)
    return jnp.where(index < jnp.asarray(lengths)[:, None], index, -1)


@functools.cache
def _full():
    """What reading both prompts at once gives."""

    def program(params, tokens):
        run = _prefill(params, methods.full(), tokens, LENGTHS)
        return run.logits, _next(params, methods.full(), run)

    return quick_jit(program)(tiny_model.params(), tiny_model.prompt(2, T))


@cases([name for name in BY_NAME if name not in MERGED])
def test_rewriting_all_is_a_prefill_and_rewriting_none_changes_nothing(name):
    transform = TRANSFORMS[name]

    def program(params, tokens):
        run, step = _prefill(params, transform, tokens, LENGTHS), tiny_model.bind(params)
        none = reuse.rewrite(step, run, tokens[:, :2], jnp.full((2, 2), -1))
        every = reuse.rewrite(step, run, tokens, _where())
        return _next(params, transform, run), _next(params, transform, none), every

    before, none, every = quick_jit(program)(tiny_model.params(), tiny_model.prompt(2, T))
    np.testing.assert_allclose(none, before, **CLOSE)
    if BY_NAME[name].prefix:
        return  # learned slots stay, so the prompt is not read as the full cache reads it
    np.testing.assert_allclose(every.logits, _full()[0], **CLOSE)
    np.testing.assert_array_equal(every.cache.length, LENGTHS)


@pytest.mark.parametrize("name", MERGED)
def test_slots_that_stand_for_several_tokens_are_not_taken_apart(name):
    run = jax.eval_shape(lambda *a: _prefill(a[0], TRANSFORMS[name], *a[1:]), *_abstract())
    with pytest.raises(ValueError, match="stand for several tokens"):
        jax.eval_shape(lambda cache: reuse.without(cache, lambda pos: pos == 3), run.cache)


def _abstract():
    return tiny_model.params(), tiny_model.prompt(2, T), jnp.asarray(LENGTHS)


@cases([name for name in BY_NAME if name not in NOT_MOVED])
def test_moved_there_and_back_is_the_same(name):
    transform = TRANSFORMS[name]

    def program(params, tokens):
        run = _prefill(params, transform, tokens, LENGTHS)
        there = reuse.moved(run.cache, jnp.array([7, 5]), ROPES)
        back = run._replace(cache=reuse.moved(there, jnp.array([-7, -5]), ROPES))
        return _next(params, transform, run), _next(params, transform, back), there.length

    before, after, length = quick_jit(program)(tiny_model.params(), tiny_model.prompt(2, T))
    np.testing.assert_allclose(after, before, **CLOSE)
    np.testing.assert_array_equal(length, [31, 18])


@cases(NOT_MOVED, fast=("int4", "streamingllm", "think"))
def test_what_cannot_be_moved_exactly_says_why(name):
    run = jax.eval_shape(lambda *a: _prefill(a[0], TRANSFORMS[name], *a[1:]), *_abstract())
    with pytest.raises(ValueError, match=NOT_MOVED[name]):
        jax.eval_shape(lambda cache: reuse.moved(cache, 3, ROPES), run.cache)


@cases(["int4", "kivi2", "int8"])
def test_codes_are_moved_by_encoding_them_again(name):
    transform = TRANSFORMS[name]

    def program(params, tokens):
        run = _prefill(params, transform, tokens, LENGTHS)
        there = reuse.moved(run.cache, 16, ROPES, reencode=True)
        back = reuse.moved(there, -16, ROPES, reencode=True)
        keys = lambda cache: [segment.dense().k for layer in cache.layers for segment in layer.segments]
        return keys(run.cache), keys(back)

    for before, after in zip(*quick_jit(program)(tiny_model.params(), tiny_model.prompt(2, T))):
        error = jnp.linalg.norm(after - before) / jnp.linalg.norm(before)
        assert error < {"int8": 0.02, "int4": 0.2, "kivi2": 1.0}[name]  # two more roundings of so many bits


def test_some_tokens_are_read_again_where_they_are_and_forks_do_not_touch_each_other():
    def program(params, tokens, wrong):
        step, method = tiny_model.bind(params), methods.full()
        run = _prefill(params, method, tokens, LENGTHS)
        scattered = jnp.array([[3, 7, 8, 20, 23], [0, 5, 12, -1, -1]])
        again = jnp.take_along_axis(tokens, jnp.maximum(scattered, 0), axis=1)
        stale = _prefill(params, method, jnp.where(_where() >= 6, wrong, tokens), LENGTHS)
        later = jnp.where(_where() >= 6, _where(), -1)
        later, of_later = later[:, 6:], tokens[:, 6:]
        forks = reuse.taken_rows(run, [1, 0, 1])
        return (
            reuse.rewrite(step, run, again, scattered, room=0),
            reuse.rewrite(step, stale, of_later, later, room=0),
            _next(params, method, run._replace(cache=run.cache.reserve(0))),
            _next(params, method, forks),
            _next(params, method, reuse.taken_rows(run, [1])),
        )

    tokens = tiny_model.prompt(2, T)
    some, later, both, forks, alone = quick_jit(program)(tiny_model.params(), tokens, tiny_model.prompt(2, T, seed=5))
    np.testing.assert_allclose(some.logits, _full()[0], **CLOSE)
    np.testing.assert_allclose(later.logits, _full()[0], **CLOSE)
    np.testing.assert_array_equal(some.cache.length, LENGTHS)
    np.testing.assert_allclose(both, _full()[1], **CLOSE)
    # The fork that went on with two tokens is the second row; the third, of the same row, with one, as it did before.
    np.testing.assert_allclose(forks[0], alone[0], **CLOSE)
    np.testing.assert_allclose(forks[2], _one_more(1), **CLOSE)


@functools.cache
def _one_more(row):
    """Logits of the full cache after one token that the third fork was given."""
    more = tiny_model.prompt(3, 2, seed=3)[2:, :1]
    tokens = tiny_model.prompt(2, T)[row : row + 1]

    def program(params, tokens, more):
        run = _prefill(params, methods.full(), tokens, LENGTHS[row : row + 1])
        return kvjax.extend(tiny_model.bind(params), methods.full(), run, more, jnp.array([1]))[0].logits

    return quick_jit(program)(tiny_model.params(), tokens, more)[0]


def test_a_tree_of_attached_caches_is_the_flat_prompt_and_counts_once():
    """A trunk for four rows, two branches for two rows each, and four leaves (Hydragen)."""
    trunk, branches, leaves = tiny_model.prompt(1, 6), tiny_model.prompt(2, 5, seed=1), tiny_model.prompt(4, 7, seed=2)
    flat = jnp.concatenate([jnp.repeat(trunk, 4, 0), jnp.repeat(branches, 2, 0), leaves], axis=1)

    def program(params):
        method = methods.full()
        root = _prefill(params, method, trunk, [6], room=0).cache
        branch = _prefill(params, kvjax.chain(kvjax.before(root), method), branches, [5, 5], room=0).cache
        tree = kvjax.chain(kvjax.before(branch), method)
        run = _prefill(params, tree, leaves, [7, 4, 7, 5])
        whole = _prefill(params, method, flat, [18, 15, 18, 16])
        return run, whole, _next(params, tree, run), _next(params, method, whole)

    run, whole, after, expected = quick_jit(program)(tiny_model.params())
    np.testing.assert_allclose(run.logits, whole.logits, **CLOSE)
    np.testing.assert_allclose(after, expected, **CLOSE)
    np.testing.assert_array_equal(run.cache.length, whole.cache.length)
    each = tiny_model.CONFIG.num_layers * tiny_model.CONFIG.num_kv_heads * (2 * tiny_model.CONFIG.head_dim * 4 + 4)
    assert kvjax.nbytes(run.cache) == each * (6 + 2 * 5 + 4 * (7 + ROOM)) + 4 * 4


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_what_is_attached_takes_the_same_bytes_whatever_the_batch(batch):
    held = jax.eval_shape(lambda p: _prefill(p, methods.full(), tiny_model.prompt(1, 20), [20], 0), tiny_model.params())
    attach = lambda held: kvjax.before(held).schedule.before(tiny_model.empty(batch))
    cache = jax.eval_shape(attach, held.cache)
    assert kvjax.nbytes(cache) - 4 * batch == kvjax.nbytes(held.cache) - 4


@cases([name for name in BY_NAME if name not in NOT_BEHIND])
def test_every_method_works_behind_and_before_what_is_attached(name):
    """A row behind an attached cache is the same alone; and attached, what the method left is read by every row."""
    transform = TRANSFORMS[name]

    def program(params, tokens):
        shared = _prefill(params, methods.full(), tiny_model.prompt(1, 8, seed=1), [8], room=0).cache
        behind = kvjax.chain(kvjax.before(shared), transform)
        both, alone = (_prefill(params, behind, tokens[:rows], LENGTHS[:rows]) for rows in (2, 1))
        left = _prefill(params, transform, tokens, LENGTHS).cache
        after = kvjax.chain(kvjax.before(left), methods.full())
        question = tiny_model.prompt(2, 5, seed=2)
        return both.logits, alone.logits, _next(params, behind, both), _prefill(params, after, question, [5, 3]).logits

    both, alone, more, asked = quick_jit(program)(tiny_model.params(), tiny_model.prompt(2, T))
    np.testing.assert_allclose(both[0], alone[0], **CLOSE)
    assert np.isfinite(more).all() and np.isfinite(asked).all()


@pytest.mark.parametrize("name", NOT_BEHIND)
def test_what_cannot_follow_what_is_attached_says_why(name):
    held = jax.eval_shape(lambda p: _prefill(p, methods.full(), tiny_model.prompt(1, 4), [4], 0), tiny_model.params())
    behind = lambda cache: kvjax.chain(kvjax.before(cache), TRANSFORMS[name])
    with pytest.raises(ValueError, match=NOT_BEHIND[name]):
        jax.eval_shape(lambda p, c, *a: _prefill(p, behind(c), *a), tiny_model.params(), held.cache, *_abstract()[1:])


def test_one_context_in_parallel_at_temperature_one_is_the_sequence():
    """APE; and two contexts lie at the same positions."""
    prefix, context, question = (tiny_model.prompt(1, n, seed=i) for i, n in enumerate((4, 9, 5)))

    def program(params):
        method = methods.full()
        head = _prefill(params, method, prefix, [4], room=0).cache
        apart = _prefill(params, kvjax.chain(kvjax.before(head), method), context, [9], room=0).cache
        contexts = [reuse.detached(apart, head)]
        asked = lambda cache: _prefill(params, kvjax.chain(kvjax.before(cache), method), question, [5])
        one = asked(reuse.ape(head, contexts, temperature=1.0, factor=1.0))
        two = asked(reuse.ape(head, contexts * 2))
        whole = _prefill(params, method, jnp.concatenate([prefix, context, question], axis=1), [18])
        return one, two, whole

    one, two, whole = quick_jit(program)(tiny_model.params())
    np.testing.assert_allclose(one.logits, whole.logits, **CLOSE)
    np.testing.assert_array_equal([one.cache.length, two.cache.length], [[18], [18]])
    assert np.isfinite(two.logits).all()


def test_a_tempered_part_is_the_formula():
    """Against NumPy: softmax at 1 / T over the part, and `S T logsumexp(x / T)` in the merge."""
    rng = np.random.default_rng(0)
    k, v, q = (jnp.float32(rng.normal(size=shape)) for shape in ((1, 2, 5, 8), (1, 2, 5, 8), (1, 3, 4, 8)))
    part = kvjax.Segment.of(k, v, jnp.broadcast_to(jnp.array([0, 1, 2, 3, -1]), (1, 2, 5)))
    queries = kvjax.Queries(q, jnp.array([[5, 6, 7]]), None)
    got = TemperedSegment((part,), 0.5, 0.8).attend(queries)
    x = np.einsum("btkgh,bksh->btkgs", q.reshape(1, 3, 2, 2, 8), k)[..., :4] * 8**-0.5 / 0.5
    lse = np.log(np.sum(np.exp(x), axis=-1))
    out = np.einsum("btkgs,bksh->btkgh", np.exp(x - lse[..., None]), v[:, :, :4])
    np.testing.assert_allclose(got.lse, 0.8 * 0.5 * lse.reshape(1, 3, 4), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.out, out.reshape(1, 3, 4, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_edit_moves_what_follows_and_reads_what_is_new():
    """PIE: values of what follows stay and keys are turned; where nothing follows, all is exact."""
    tokens, new = tiny_model.prompt(1, T), tiny_model.prompt(1, 5, seed=4)

    def program(params):
        step, method = tiny_model.bind(params), methods.full()
        run = _prefill(params, method, tokens, [T])
        edited = reuse.pie(step, run, 8, 11, new, ROPES)
        at_end = reuse.pie(step, run, 20, T, new, ROPES)
        whole = _prefill(params, method, jnp.concatenate([tokens[:, :20], new], axis=1), [25])
        return run, edited, at_end, whole, _next(params, method, at_end), _next(params, method, whole)

    run, edited, at_end, whole, after, expected = quick_jit(program)(tiny_model.params())
    np.testing.assert_allclose(at_end.logits, whole.logits, **CLOSE)
    np.testing.assert_allclose(after, expected, **CLOSE)
    assert int(edited.cache.length[0]) == T + 2
    for before, now in zip(run.cache.layers, edited.cache.layers):
        by_position = lambda layer: layer.segments[-1].in_token_order()
        old, moved = by_position(before), by_position(now)
        np.testing.assert_array_equal(moved.v[:, :, 13:26], old.v[:, :, 11:24])
        np.testing.assert_array_equal(moved.pos[0, 0, :26], np.arange(26))


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_blending_all_tokens_is_a_prefill(ratio):
    """CacheBlend; the first text was read as it is, so it is not stale."""
    texts, question = tiny_model.prompt(2, 12), tiny_model.prompt(1, 4, seed=2)
    config = tiny_model.CONFIG
    flat = texts.reshape(1, -1)

    def program(params):
        step, method = bind(params, config), methods.full()
        apart = _prefill(params, method, texts, [12, 12], room=0).cache
        first, second = (reuse.cache_rows(apart, [row]) for row in (0, 1))
        cache = reuse.joined(first, reuse.moved(second, 12, ROPES))
        blended = reuse.cacheblend(step, first_layers(step, 1), cache, flat, ratio=ratio)
        asked = _prefill(params, kvjax.chain(kvjax.before(blended.cache), method), question, [4])
        return blended, asked.logits, _prefill(params, method, jnp.concatenate([flat, question], axis=1), [28]).logits

    blended, got, expected = quick_jit(program)(tiny_model.params())
    assert blended.positions.shape == (1, int(24 * ratio))
    np.testing.assert_allclose(blended.staleness[0, :12], 0, atol=1e-6)
    if ratio == 1:
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_blocks_are_written_into_any_that_are_empty():
    """Two blocks that fill at once go into the second and the fourth; the third, between them, stays."""
    def slots(pos):
        pos = jnp.broadcast_to(jnp.asarray(pos), (1, 1, len(pos)))
        x = jnp.broadcast_to(pos[..., None].astype(jnp.float32), (*pos.shape, 4))
        return kvjax.Segment.of(x, x, pos)

    blocked = kvjax.BlockedSegment(slots([0, 1, 2, 3, 4, 5, -1, -1]), slots([-1, -1]))
    holed = reuse.without(
        kvjax.Cache((kvjax.LayerCache((blocked,)),), jnp.array([6])), lambda pos: (pos == 2) | (pos == 3)
    ).layers[0].segments[0]
    pos = jnp.array([[6, 7, 8, 9, 10]])
    x = jnp.broadcast_to(pos[:, None, :, None].astype(jnp.float32), (1, 1, 5, 4))
    after = holed.append(x, x, pos, None)
    np.testing.assert_array_equal(after.body.pos[0, 0], [0, 1, 6, 7, 4, 5, 8, 9])
    np.testing.assert_array_equal(after.body.k[0, 0, :, 0], [0, 1, 6, 7, 4, 5, 8, 9])
    np.testing.assert_array_equal(after.tail.pos[0, 0], [10, -1])


def test_wrong_arguments_are_refused():
    run = kvjax.Run(*jax.eval_shape(lambda *a: _prefill(a[0], methods.full(), *a[1:]), *_abstract()))
    with pytest.raises(ValueError, match="ropes must be one for each"):
        reuse.moved(run.cache, 1, ROPES[:1])
    with pytest.raises(ValueError, match="temperature and factor must be above 0"):
        reuse.tempered(run.cache, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"rows must be from 0 to 1, got \[2\]"):
        reuse.taken_rows(run, [2])
    with pytest.raises(ValueError, match="positions must increase"):
        reuse.rewritten(None, run.cache, jnp.zeros((2, 2), jnp.int32), jnp.array([[3, 3], [0, 1]]))
    with pytest.raises(ValueError, match=r"tokens and positions must be \[2, T\]"):
        reuse.rewritten(None, run.cache, jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="multiple of the 2 rows"):
        kvjax.before(run.cache).schedule.before(tiny_model.empty(3))
    with pytest.raises(ValueError, match="joined needs at least one"):
        reuse.joined()
    with pytest.raises(ValueError, match="start and stop must be positions in order"):
        reuse.pie(None, run, 3, 2, jnp.zeros((2, 1), jnp.int32), ROPES)
    with pytest.raises(ValueError, match="ratio must be from 0 to 1"):
        reuse.cacheblend(None, None, run.cache, jnp.zeros((2, 4), jnp.int32), ratio=1.5)


def test_positions_in_shared_slots_are_not_rewritten_and_none_falls_below_zero():
    def slots(rows, first):
        pos = jnp.broadcast_to(first + jnp.arange(4), (rows, 2, 4))
        x = jnp.ones((*pos.shape, 8))
        return kvjax.Segment.of(x, x, pos)

    layer = kvjax.LayerCache((slots(1, 0), slots(2, 4)))
    cache = kvjax.Cache(layers=(layer,), length=jnp.array([8, 8]))
    with pytest.raises(ValueError, match="slots that rows share"):
        reuse.rewritten(None, cache, jnp.zeros((2, 2), jnp.int32), jnp.array([[4, 5], [2, 5]]))
    with pytest.raises(ValueError, match=r"by must keep positions at 0 or above, got -5 and one at 4"):
        reuse.moved(cache, -5, kvjax.Rope(jnp.ones(4)), start=4)
    gone = reuse.without(cache, lambda pos: (pos >= 2) & (pos < 6))
    held = [np.asarray(segment.pos[0, 0]).tolist() for segment in gone.layers[0].segments]
    assert held == [[0, 1, -1, -1], [-1, -1, 6, 7]]
