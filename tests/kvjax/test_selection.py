"""Which slots stay: by score, then by position, whatever the slots' order, the batch or the numbers a scorer gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Cache, Rope, Scorer, Segment, methods, scores
from kvjax.segments.slots import highest_slot, keep_highest, lowest, priority
from kvjax.transforms.merge_layers import merge_layers
from tests.kvjax import tiny_model
from tests.kvjax.conformance import positions
from tests.kvjax.slot_arrays import ROPE, H, K, T, seen_of, slots_cache
from tests.quick_jit import quick_jit

BUDGET, SINKS, RECENT = 8, 2, 3
INF, NAN = np.inf, np.nan


def _of_token(table):
    """A scorer that looks f32[B, K, T] up by position."""
    score = lambda segment, seen: jnp.take_along_axis(jnp.float32(table), jnp.maximum(segment.pos, 0), axis=-1)
    return Scorer(score=score)


def _orders(rng, rows):
    return jnp.int32(np.argsort(rng.random((rows, K, T)), axis=-1))


def test_numbers_of_every_kind_have_one_order():
    ascending = [NAN, -INF, -1e31, -1.0, 0.0, 1e-30, 1e31, INF, 0.0, NAN]
    pos = jnp.arange(10)
    protected = pos >= 8  # the newest two, the older of which comes first here
    got = priority(jnp.float32(ascending), pos, protected)
    assert (np.diff(np.int64(got))[1:] > 0).all()
    assert got[0] == got[1]  # NaN is -inf
    empty = priority(jnp.float32([-INF, INF]), jnp.int32([0, -1]))
    assert empty[0] > empty[1]
    assert len(set(priority(jnp.float32([0.0, -0.0]), jnp.arange(2)).tolist())) == 1


def test_ties_go_to_the_older_token_wherever_its_slot_lies():
    rng = np.random.default_rng(0)
    keep, drop, best = jax.jit(keep_highest, static_argnums=2), jax.jit(lowest), jax.jit(highest_slot)
    for _ in range(20):
        worth = rng.integers(0, 3, size=(2, K, T))  # many ties
        pos = np.where(rng.random((2, K, T)) < 0.8, np.argsort(rng.random((2, K, T)), axis=-1), -1)
        order = priority(jnp.float32(worth), jnp.int32(pos))
        order, pos = np.asarray(order), np.int32(pos)
        index, valid = map(np.asarray, keep(order, pos, 7, jnp.int32([7, 4])))
        few, many = (np.asarray(drop(order, pos, jnp.int32(n))) for n in ([[1, 1], [1, 1]], [[0, 5], [3, 1]]))
        value, slot = map(np.asarray, best(np.float32(worth), pos))
        for b, h in np.ndindex(2, K):
            occupied = [s for s in range(T) if pos[b, h, s] >= 0]
            best_first = sorted(occupied, key=lambda s: (-worth[b, h, s], pos[b, h, s]))
            assert index[b, h][valid[b, h]].tolist() == sorted(best_first[: (7, 4)[b]])
            assert np.flatnonzero(few[b, h]).tolist() == best_first[-1:]
            count = ((0, 5), (3, 1))[b][h]
            assert np.flatnonzero(many[b, h]).tolist() == sorted(best_first[len(best_first) - count :])
            assert slot[b, h] == min(range(T), key=lambda s: (-worth[b, h, s], pos[b, h, s]))
            assert value[b, h] == worth[b, h].max()


_heads = kvjax.adaptive(floor=0.0)
_more = dict(sinks=SINKS, recent=RECENT)
_MIX = {"kernel": jnp.zeros((3, 2 * H, 2)), "bias": jnp.zeros(2), "mix": jnp.float32(0.5)}
TRANSFORMS = {
    "evict": lambda s: kvjax.evict(s, BUDGET, **_more),
    "evict_by_head": lambda s: kvjax.evict_by_head(s, BUDGET, heads=_heads, page=4, **_more),
    "evict_across_layers": lambda s: kvjax.evict_across_layers(s, BUDGET, heads=_heads, page=4, **_more),
    "by_layer_weights": lambda s: kvjax.evict_across_layers(
        s, BUDGET, layers=lambda segment, seen: s.score(segment, seen)[:, 0, 5], page=4, **_more
    ),
    "into_nearest": lambda s: kvjax.merge(s, BUDGET, kvjax.into_nearest(), **_more),
    "into_runs": lambda s: kvjax.merge(s, BUDGET, kvjax.into_runs(), **_more),
    "convolve": lambda s: kvjax.convolve(s, BUDGET, 2, **_more),
    "split_slots": lambda s: kvjax.split_slots(s, BUDGET, **_more),
}
NUMBERS = {
    "constant": lambda rng: np.ones((3, K, T)),
    "ties": lambda rng: rng.integers(0, 2, size=(3, K, T)),
    "1e31": lambda rng: rng.choice([1e31, -1e31, 0.0], size=(3, K, T)),
    "infinite": lambda rng: rng.choice([INF, -INF, 0.0, 1.0], size=(3, K, T)),
    "nan": lambda rng: np.full((3, K, T), NAN),
    "everything": lambda rng: rng.choice([NAN, INF, -INF, 3e38, -3e38, 0.0, 1.0], size=(3, K, T)),
}


@functools.cache
def _program(name, lengths, slots):
    seen = seen_of(lengths, slots, layers=2, learned=_MIX)
    return quick_jit(lambda table, cache: TRANSFORMS[name](_of_token(table)).init(cache, seen)[0])


def _kept(name, table, k, lengths, order=None):
    """Positions that a transform of the slots leaves, of `split_slots` in the last segment; by row, layer and head."""
    cache = _program(name, lengths, k.shape[2])(jnp.float32(table), slots_cache(k, lengths, layers=2, order=order))
    if name == "split_slots":
        cache = cache.map_layers(lambda layer: layer.replace(segments=layer.segments[-1:]))
    return [positions(cache, row) for row in range(len(lengths))]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_score_evicts_what_is_protected_and_no_neighbour_decides(name):
    rng = np.random.default_rng(1)
    lengths = (20, 13, 2)
    k = rng.normal(size=(3, K, T, H))
    k[:, :, 9] = k[:, :, 4]  # a token that comes twice
    for numbers in NUMBERS.values():
        table = numbers(rng)
        kept = _kept(name, table, k, lengths)
        for n, row in zip(lengths, kept):
            for head in (head for layer in row for head in layer):
                assert {*range(min(SINKS, n)), *range(max(n - RECENT, 0), n)} <= set(head)
            held = sum(len(head) for layer in row for head in layer)
            assert held == 2 * K * min(BUDGET, n)
        if name not in ("into_nearest", "into_runs", "convolve"):  # merged slots move where a similarity says
            for n, row in zip(lengths, kept):
                if len({*np.nan_to_num(table).ravel()}) == 1:
                    first = sorted({*range(min(BUDGET - RECENT, n)), *range(max(n - RECENT, 0), n)})
                    assert all(head == first for layer in row for head in layer)
        assert _kept(name, table, k, lengths, order=_orders(rng, 3)) == kept
        one = np.s_[1:2, :, :13]
        assert _kept(name, table[one], k[one], lengths[1:2]) == kept[1:2]


def test_protected_slots_stay_while_tokens_come():
    lengths, rng = (T, 9), np.random.default_rng(2)
    table = rng.choice([NAN, INF, -INF, 1e31, 0.0], size=(2, K, T + 4))
    transform = kvjax.evict(_of_token(table), BUDGET, **_more)
    cache, state = transform.init(slots_cache(rng.normal(size=(2, K, T, H)), lengths), seen_of(lengths))
    cache = cache.reserve(1)
    for t in range(4):
        pos = jnp.int32([[lengths[0] + t], [lengths[1] + t]])
        new = jnp.ones((2, K, 1, H))
        tail = cache.layers[0].segments[0].append(new, new, pos, ROPE)
        cache = cache.map_layers(lambda layer: layer.with_tail(tail))
        cache, state = transform.step(cache, state, seen_of(lengths, phase="decode"))
        for row, n in enumerate(lengths):
            for head in positions(cache, row)[0]:
                assert len(head) == BUDGET
                assert {0, 1, n + t - 2, n + t - 1, n + t} <= set(head)


def test_scores_of_minus_infinity_and_nan_are_not_protected():
    table = np.full((1, K, T), -INF)
    table[0, :, 3], table[0, :, 4], table[0, :, 5] = 1.0, NAN, INF
    transform = kvjax.protect(kvjax.identity(), _of_token(table)._replace(aligned=True), 4)
    cache, _ = transform.init(slots_cache(np.ones((1, K, T, H)), (T,)), seen_of((T,)))
    protected = cache.layers[0].segments[0].pos
    assert all(sorted(p for p in head.tolist() if p >= 0) == [3, 5] for head in protected[0])


@pytest.mark.parametrize("name", [*TRANSFORMS, "protect"])
def test_what_is_no_scorer_or_gives_no_scores_is_refused_by_name(name):
    build = TRANSFORMS.get(name, lambda s: kvjax.protect(kvjax.identity(), s, 4))
    with pytest.raises(TypeError, match=r"\w+ needs a Scorer, .*, got <function"):
        build(lambda segment, seen: segment.pos)
    if name == "by_layer_weights":
        return
    cache, seen = slots_cache(np.ones((1, K, T, H)), (T,), layers=2), seen_of((T,), layers=2, learned=_MIX)

    def by_token(segment, seen):
        return segment.pos[:, 0].astype(jnp.float32)

    for score, came in ((by_token, r"float32\[1, 20\]"), (lambda segment, seen: 1.0, r"float\[\]")):
        message = rf"scorer .*{score.__name__}.* must return a real number for each slot, \[B, K, S\] = \[1, 2, 20\], "
        with pytest.raises(ValueError, match=message + f"got {came}"):
            jax.eval_shape(build(Scorer(score=score)).init, cache, seen)


def test_merged_slots_are_no_merge_rule():
    with pytest.raises(TypeError, match="merge needs a MergeRule, such as .*, got <function"):
        kvjax.merge(scores.random(0), 8, lambda ranked, state: None)


def test_equal_keys_tie_by_position_not_by_rounding():
    """A token has one norm wherever it stands; its rotated keys have it up to rounding."""
    rng = np.random.default_rng(3)
    token = np.array([0, 1] * 10)  # the second one is longer
    k = np.float32(rng.normal(size=(2, 8)) * [[1.0], [1.5]])[token]
    for base in (10.0, 100.0, 1e4):
        rotated = kvjax.rotate(jnp.asarray(k), jnp.arange(T), Rope.from_base(base, 8))[None, None]
        for scale in rng.uniform(0.9, 1.1, size=8).astype(np.float32):
            segment = Segment.of(rotated * scale, rotated, jnp.arange(T)[None, None])
            worth = scores.negative_key_norm().score(segment, None)
            index, _ = keep_highest(priority(worth, segment.pos), segment.pos, 5)
            if len(set(np.asarray(worth[0, 0, ::2]).tolist())) == 1:  # all but one norm in a hundred or so
                assert index[0, 0].tolist() == [0, 2, 4, 6, 8]
                break
        else:
            pytest.fail("equal tokens never have equal scores")


def test_minicache_retains_the_same_tokens_of_a_row_alone_and_in_a_batch():
    """The token of the largest key angle and that of the largest value angle both have 1: a tie by construction."""
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(2, 40, K, T, 2, H))  # layers, rows; keys and values
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    angle = np.arccos(np.clip((unit(rows[0]) * unit(rows[1])).sum(axis=-1), -1, 1))  # [rows, K, T, 2]
    scaled = (angle - angle.min(axis=2, keepdims=True)) / np.ptp(angle, axis=2, keepdims=True)
    transform = merge_layers(0, 1)

    def retained(picked, lengths, slots):
        k, v = (rows[:, picked][:, :, :, :slots, i] for i in (0, 1))
        layers = [slots_cache(k[i], lengths, v[i]).layers[0] for i in (0, 1)]
        cache = Cache(tuple(layers), length=jnp.int32(lengths))
        cache, _ = transform.init(cache, seen_of(lengths, slots, layers=2))
        return [layer.segments[-1].pos[..., 0] for layer in cache.layers]

    first, second = retained(np.arange(40), (T,) * 40, T)
    np.testing.assert_array_equal(first, second)
    want = np.argmax(scaled.max(axis=-1) > 1 - 1e-9, axis=-1)  # the first that is the largest in either
    np.testing.assert_array_equal(first, want)
    for row in range(0, 40, 4):
        np.testing.assert_array_equal(retained([row], (T,), T)[0][0], want[row])
    short = retained([0, 1], (12, T), T)[0][0]
    np.testing.assert_array_equal(retained([0], (12,), 12)[0][0], short)


def test_angles_that_only_rounding_tells_apart_are_a_tie():
    """Every token's keys and values turn by the same angle from layer to layer."""
    rng = np.random.default_rng(5)
    a = rng.normal(size=(1, K, T, 2, H // 2, 2)) @ np.eye(2)
    turn = np.array([[np.cos(0.7), np.sin(0.7)], [-np.sin(0.7), np.cos(0.7)]])
    b = a @ turn
    parts = lambda x: (x[:, :, :, i].reshape(1, K, T, H) for i in (0, 1))
    layers = [slots_cache(k, (T,), v).layers[0] for k, v in (parts(a), parts(b))]
    cache, _ = merge_layers(0, 3).init(Cache(tuple(layers), length=jnp.int32([T])), seen_of((T,), layers=2))
    assert cache.layers[0].segments[-1].pos[0].tolist() == [[0, 1, 2]] * K


@pytest.mark.parametrize("budget, sinks, recent", [(6, 4, 0.5), (0.25, 4, 0.5), (6, 2, 1.0), (5, 0, 0.4)])
def test_a_fraction_of_recent_tokens_leaves_the_sinks_their_place(budget, sinks, recent):
    step, tokens = tiny_model.bind(tiny_model.params()), tiny_model.prompt(1, 12)
    method = kvjax.at_prefill_end(kvjax.evict(scores.negative_key_norm(), budget, sinks=sinks, recent=recent))
    run = kvjax.prefill(step, method, tokens, jnp.array([12]), tiny_model.empty(1), room=0)
    size = max(budget if isinstance(budget, int) else int(budget * 12), sinks + 1)
    newest = min(max(int(recent * size), 1), size - sinks)
    for head in (head.tolist() for layer in kvjax.inspection.held_positions(run.cache, 0) for head in layer):
        assert len(head) == size and {*range(sinks), *range(12 - newest, 12)} <= set(head)


@pytest.mark.parametrize(
    "method",
    [
        lambda: methods.keydiff(0.25),
        lambda: methods.kvmerger(0.25, whole=()),
        pytest.param(lambda: methods.kvmerger(kvjax.Tokens(1), whole=()), marks=pytest.mark.slow),
        lambda: methods.d2o(0.25, whole=()),
    ],
    ids=["keydiff", "kvmerger", "kvmerger_1", "d2o"],
)
def test_equal_tokens_are_chosen_alike_alone_and_beside_a_longer_row(method):
    step, transform = tiny_model.bind(tiny_model.params()), method()

    def positions_of(tokens, lengths):
        def held():
            run = kvjax.prefill(step, transform, tokens, jnp.array(lengths), tiny_model.empty(len(lengths)), room=4)
            return [layer.segments[-1].pos for layer in run.cache.layers]

        return [[sorted(x for x in head if x >= 0) for head in pos[0].tolist()] for pos in quick_jit(held)()]

    for rows in (jnp.full((2, 20), 5), tiny_model.prompt(2, 20)):
        assert positions_of(rows[:1, :7], [7]) == positions_of(rows, [7, 20])
