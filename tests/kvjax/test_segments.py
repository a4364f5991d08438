"""Segments: where tokens are written, what is overwritten, and that every representation attends alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import BlockedSegment, Queries, Ring, Rope, Segment, rotate
from kvjax.cache import LayerCache
from tests.kvjax.encoders import affine
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

B, K, N, H = 2, 2, 4, 8
ROPE = Rope.from_base(100.0, H)
CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32 against float64, a few dozen slots


def _kv(tokens: int, seed: int = 0, batch: int = B) -> tuple[jax.Array, jax.Array]:
    """Un-rotated keys, and values, [B, K, T, H]."""
    k, v = np.random.default_rng(seed).normal(size=(2, batch, K, tokens, H))
    return jnp.float32(k), jnp.float32(v)


def _pos(*rows) -> jax.Array:
    return jnp.array(rows, jnp.int32)


def _dense(slots: int, **static) -> Segment:
    return Segment.empty(B, K, slots, H, jnp.float32, **static)


# One program compiles faster than its operations one by one.
_append = quick_jit(lambda segment, k, v, pos: segment.append(k, v, pos, ROPE))
_attend = quick_jit(lambda part, queries, **how: part.attend(queries, **how), static_argnames=("window", "scale"))
_mass = quick_jit(lambda part, queries, lse, **how: part.mass(queries, lse, **how), static_argnames=("window", "scale"))


def _filled(tokens: int, slots: int | None = None, seed: int = 0, **static) -> Segment:
    """Tokens 0 .. tokens - 1 in a segment of `slots` slots."""
    empty = _dense((slots or tokens) - tokens, **static)
    new = _append(_dense(0, **static), *_kv(tokens, seed), jnp.tile(jnp.arange(tokens), (B, 1)))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), new, empty)


def _queries(positions, seed: int = 9) -> Queries:
    pos = jnp.tile(jnp.asarray(positions, jnp.int32), (B, 1))
    raw = np.random.default_rng(seed).normal(size=(*pos.shape, N, H))
    return Queries(jnp.float32(raw), pos, ROPE)


def _rows(segment) -> list[list[int]]:
    """Positions of head 0 of each row; all heads hold the same."""
    pos = np.asarray(segment.pos)
    assert (pos == pos[:, :1]).all()
    return pos[:, 0].tolist()


# --- where tokens go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_tokens_take_the_first_holes(at_once):
    holes = jnp.array([0, 1, 0, 0, 1, 1], bool)
    segment = _filled(6).drop(jnp.broadcast_to(holes, (B, K, 6)))
    k, v = _kv(2, seed=1)
    if at_once:
        segment = segment.append(k, v, _pos([6, 7], [6, 7]), ROPE)
    else:
        segment = segment.append(k[:, :, :1], v[:, :, :1], _pos([6], [6]), ROPE)
        segment = segment.append(k[:, :, 1:], v[:, :, 1:], _pos([7], [7]), ROPE)
    assert _rows(segment) == [[0, 6, 2, 3, 7, -1]] * B
    np.testing.assert_allclose(segment.k[:, :, 1], rotate(k[:, :, 0], jnp.array(6), ROPE), rtol=1e-6)
    np.testing.assert_array_equal(segment.v[:, :, 4], v[:, :, 1])


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("static", [{}, {"layout": Ring(1)}])
def test_padding_writes_nowhere(T, static):
    segment = _filled(4, 8, **static)
    after = segment.append(*_kv(T, seed=1), _pos([-1] * T, [4, *[-1] * (T - 1)]), ROPE)
    assert _rows(after) == [[0, 1, 2, 3, -1, -1, -1, -1], [0, 1, 2, 3, 4, -1, -1, -1]]
    for leaf, old in zip(jax.tree.leaves(after), jax.tree.leaves(segment)):
        np.testing.assert_array_equal(leaf[0], old[0])


def test_padding_writes_nowhere_in_a_full_ring():
    segment = _filled(4, layout=Ring(1))
    for T in (1, 2):
        after = segment.append(*_kv(T, seed=1), _pos([-1] * T, [4, *[-1] * (T - 1)]), ROPE)
        assert _rows(after)[0] == [0, 1, 2, 3]
        assert sorted(_rows(after)[1]) == [0, 2, 3, 4]


def test_many_rows_are_written_as_few_are():
    # Above 32 rows and heads the write is one batched slice instead of separate ones.
    k, v = _kv(5, batch=20)
    pos = jnp.where(jnp.arange(5) < jnp.arange(20)[:, None] % 5 + 1, jnp.arange(5), -1)
    many = Segment.empty(20, K, 6, H, jnp.float32)
    for t in range(5):
        many = _append(many, k[:, :, t : t + 1], v[:, :, t : t + 1], pos[:, t : t + 1])
    once = Segment.empty(20, K, 0, H, jnp.float32).append(k, v, pos, ROPE).resize(6)
    np.testing.assert_array_equal(many.pos, once.pos)
    occupied = (once.pos >= 0)[..., None]
    np.testing.assert_allclose(many.k, jnp.where(occupied, once.k, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(many.v, jnp.where(occupied, once.v, 0))


def test_a_ring_overwrites_its_oldest_but_never_its_sinks():
    segment = _filled(5, layout=Ring(2))
    seen = []
    for p in range(5, 10):
        segment = _append(segment, *_kv(1, seed=p), _pos([p], [p]))
        seen.append(_rows(segment)[0])
    assert seen == [
        [0, 1, 5, 3, 4],
        [0, 1, 5, 6, 4],
        [0, 1, 5, 6, 7],
        [0, 1, 8, 6, 7],
        [0, 1, 8, 9, 7],
    ]


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("size", [2, 9])  # smaller than the ring, and larger
def test_a_ring_holds_the_same_however_tokens_arrive(size, sinks):
    k, v = _kv(18)
    one, several = _dense(5, layout=Ring(sinks)), _dense(5, layout=Ring(sinks))
    for t in range(18):
        one = _append(one, k[:, :, t : t + 1], v[:, :, t : t + 1], _pos([t], [t]))
    for t in range(0, 18, size):
        chunk = np.s_[:, :, t : t + size]
        pos = jnp.tile(jnp.arange(t, min(t + size, 18)), (B, 1))
        several = _append(several, k[chunk], v[chunk], pos)
    expected = [*range(sinks), *range(18 - 5 + sinks, 18)]
    for segment in (one, several):
        assert sorted(_rows(segment)[0]) == expected
    by_token = lambda s: jax.tree.map(
        lambda x: jnp.take_along_axis(x, jnp.argsort(s.pos, axis=-1)[(...,) + (None,) * (x.ndim - 3)], axis=2), s
    )
    for a, b in zip(jax.tree.leaves(by_token(one)), jax.tree.leaves(by_token(several))):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_new_tokens_start_without_statistics_and_bias():
    segment = _filled(2, 4)
    full = lambda x: jnp.full(segment.pos.shape, x)
    segment = segment.with_slots(stats={"mass": full(7.0)}, bias=full(3.0))
    after = segment.append(*_kv(1), _pos([2], [2]), ROPE)
    assert after.stats["mass"][0, 0].tolist() == [7.0, 7.0, 0.0, 7.0]
    assert after.bias[0, 0].tolist() == [3.0, 3.0, 0.0, 3.0]


def test_taken_slots_are_gathered_with_everything_they_carry():
    segment = _filled(4)
    segment = segment.with_slots(stats={"mass": segment.pos * 10.0})
    index = jnp.broadcast_to(jnp.array([3, 1, 0]), (B, K, 3))
    taken = segment.take(index, index > 0)
    assert _rows(taken) == [[3, 1, -1]] * B
    assert taken.stats["mass"][0, 0].tolist() == [30.0, 10.0, 0.0]
    np.testing.assert_array_equal(taken.k[:, :, 0], segment.k[:, :, 3])
    assert not taken.k[:, :, 2].any()  # empty slots hold finite zeros


# --- attention ----------------------------------------------------------------------------------------------------


def _reference(segment, queries, **how):
    return attention(queries.rotated, segment.k, segment.v, queries.pos, segment.pos, **how)


@pytest.mark.parametrize("how", [{}, {"window": 3}, {"scale": 0.2}])
def test_a_dense_segment_attends(how):
    segment, queries = _filled(9, 12), _queries([4, 8])
    part, want = _attend(segment, queries, **how), _reference(segment, queries, **how)
    np.testing.assert_allclose(part.out, want.out, **CLOSE)
    np.testing.assert_allclose(part.lse, want.lse, **CLOSE)
    mass = _mass(segment, queries, part.lse, **how)
    np.testing.assert_allclose(mass, want.probability.sum(axis=1), **CLOSE)


def test_keys_rotated_at_attend_are_keys_rotated_when_stored():
    stored, late = _filled(9, 12), _filled(9, 12, key_rope="at_attend")
    queries = _queries([4, 8])
    for a, b in zip(_attend(stored, queries), _attend(late, queries)):
        np.testing.assert_allclose(a, b, **CLOSE)
    np.testing.assert_allclose(
        _mass(stored, queries, _attend(stored, queries).lse), _mass(late, queries, _attend(late, queries).lse), **CLOSE
    )


def test_ranks_are_positions_as_long_as_nothing_is_missing():
    stored, ranked = (LayerCache((_filled(9, 12, key_rope=how),)) for how in ("stored", "rank"))
    queries = _queries([9])
    for a, b in zip(_attend(stored, queries), _attend(ranked, queries)):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_ranks_count_what_the_whole_layer_cache_holds():
    # Tokens 3, 5 | 8, 9 in two segments have ranks 0, 1 | 2, 3; a query at 20 has rank 4.
    pieces = []
    for keep in ([3, 5], [8, 9]):
        whole = _filled(10, key_rope="rank")
        index = jnp.broadcast_to(jnp.array(keep), (B, K, 2))
        pieces.append(whole.take(index, index >= 0))
    layer, queries = LayerCache(tuple(pieces)), _queries([20])
    part = _attend(layer, queries)
    k, v = (jnp.concatenate([getattr(s, name) for s in pieces], axis=2) for name in ("k", "v"))
    rank = jnp.broadcast_to(jnp.arange(4), (B, K, 4))
    want = attention(rotate(queries.raw, jnp.full((B, 1, 1), 4), ROPE), rotate(k, rank, ROPE), v, queries.pos, rank)
    np.testing.assert_allclose(part.out, want.out, **CLOSE)
    masses = _mass(layer, queries, part.lse)
    np.testing.assert_allclose(jnp.concatenate(masses, axis=-1), want.probability[:, 0], **CLOSE)


def test_rotated_keys_of_a_window_read_as_ranks_do():
    """Sinks 0, 1, 2 and the newest 5 of 20 tokens, in slots of any order, some of them empty."""
    index = jnp.broadcast_to(jnp.array([17, 1, 19, 0, 16, 2, 18, 15, 3, 4]), (B, K, 10))
    held = jnp.arange(10) < jnp.full((B, K, 1), 8)
    cut = lambda how: _filled(20, key_rope=how).take(index, held).replace(layout=Ring(3))
    window, ranked = (LayerCache((cut(how),)) for how in ("window", "rank"))
    queries = _queries([20, 23])._replace(ahead=jnp.array([[0, 3]]))
    parts = [_attend(layer, queries) for layer in (window, ranked)]
    for a, b in zip(*parts):
        np.testing.assert_allclose(a, b, **CLOSE)
    for a, b in zip(*(_mass(layer, queries, parts[0].lse) for layer in (window, ranked))):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("queries", [[7], [2, 9, 12]])
def test_a_prefix_shared_by_the_batch_is_the_prefix_repeated(queries):
    queries = _queries(queries)
    prefix = jax.tree.map(lambda x: x[:1], _filled(9, 12))
    repeated = jax.tree.map(lambda x: jnp.repeat(x, B, axis=0), prefix)
    own = _filled(4, seed=5)
    own = own.with_slots(pos=jnp.where(own.pos >= 0, own.pos + 9, -1))
    for a, b in zip(_attend(LayerCache((prefix, own)), queries), _attend(LayerCache((repeated, own)), queries)):
        np.testing.assert_allclose(a, b, **CLOSE)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=16, max_size=16), st.integers(0, 2**16))
def test_any_split_into_segments_attends_as_one(owner, seed):
    whole, queries = _filled(16, seed=seed), _queries([3, 15], seed)
    owner = jnp.asarray(owner)
    layer = LayerCache(tuple(whole.drop(jnp.broadcast_to(owner != i, whole.pos.shape)) for i in range(3)))
    want = _reference(whole, queries)
    part = _attend(layer, queries)
    np.testing.assert_allclose(part.out, want.out, **CLOSE)
    np.testing.assert_allclose(part.lse, want.lse, **CLOSE)
    np.testing.assert_allclose(sum(_mass(layer, queries, part.lse)), want.probability.sum(axis=1), **CLOSE)


# --- blocks -------------------------------------------------------------------------------------------------------

BLOCK = 8


def _encode(slots):
    return affine(slots, bits=8, key_group=4, value_group=4, scale_dtype="float32")


_buffered = quick_jit(
    lambda slots, room: BlockedSegment.from_dense(slots, _encode, BLOCK).reserve(room), static_argnums=1
)


@quick_jit
def _by_token(segment: BlockedSegment) -> Segment:
    """All slots as numbers, in token order, empty slots zero."""
    dense = segment.dense()
    order = jnp.argsort(jnp.where(dense.pos < 0, 10**6, dense.pos), axis=-1)
    return dense.take(order, jnp.take_along_axis(dense.pos, order, axis=-1) >= 0)


def _assert_same_tokens(a: Segment, b: Segment, tokens: int) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert not (np.asarray(a.pos)[..., tokens:] >= 0).any()
        # The same codes of the same numbers; jit and eager multiply and add in one or two roundings.
        np.testing.assert_allclose(x[:, :, :tokens], y[:, :, :tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 21, [5, 5, 5, 5, 1], [21]])
def test_rows_flush_at_different_times_into_what_encoding_everything_gives(sizes):
    # Row 0 starts with 10 tokens and gets 21; row 1 starts with 3 and gets nothing in every other call.
    start, total = np.array([10, 3]), 31
    k, v = _kv(total)
    pos = lambda lengths: jnp.where(jnp.arange(total) < jnp.asarray(lengths)[:, None], jnp.arange(total), -1)
    segment = _buffered(_dense(0).append(k, v, pos(start), ROPE).resize(total), sum(sizes))
    length = start.copy()
    for call, size in enumerate(sizes):
        fresh = np.array([size, size if call % 2 else size // 2])
        index = length[:, None] + np.arange(size)
        new = jnp.asarray(np.where(np.arange(size) < fresh[:, None], index, -1))
        gather = jnp.asarray(np.minimum(index, total - 1))[:, None, :, None]
        segment = _append(segment, *(jnp.take_along_axis(x, gather, axis=2) for x in (k, v)), new)
        length += fresh
        pending = np.asarray(jnp.sum(segment.tail.pos >= 0, axis=-1))
        np.testing.assert_array_equal(pending, np.broadcast_to(length[:, None] % BLOCK, (B, K)))
    everything = _dense(0).append(k, v, pos(length), ROPE)
    _assert_same_tokens(_by_token(segment), _by_token(_buffered(everything, 0)), total)


@pytest.mark.parametrize("tokens", [0, 3, 8, 21])
def test_whole_blocks_are_encoded_and_the_newest_tokens_stay_exact(tokens):
    slots = _filled(tokens, 24) if tokens else _dense(24)
    segment = _buffered(slots, 8)
    full = tokens // BLOCK * BLOCK
    body = np.asarray(segment.body.pos)[:, :, :full]
    assert (body == np.arange(full)).all() and (np.asarray(segment.body.pos)[:, :, full:] == -1).all()
    exact = segment.tail.k[:, :, : tokens - full]
    np.testing.assert_array_equal(exact, slots.k[:, :, full:tokens])
    # 8 bits: an error of half a 255th of a range of about 4.
    np.testing.assert_allclose(_by_token(segment).k[:, :, :tokens], slots.k[:, :, :tokens], atol=0.02)


def test_an_empty_body_attends_to_nothing():
    segment = quick_jit(lambda dense: BlockedSegment.from_dense(dense, _encode, BLOCK))(_dense(0))
    assert segment.body.pos.shape[-1] == 0
    part = _attend(segment, _queries([4]))
    assert not part.out.any() and (part.lse == -jnp.inf).all()


def test_room_for_an_empty_body_holds_the_tokens():
    segment = _buffered(_dense(0), 20)
    k, v = _kv(20)
    for t in range(20):
        segment = _append(segment, k[:, :, t : t + 1], v[:, :, t : t + 1], _pos([t], [t]))
    _assert_same_tokens(_by_token(segment), _by_token(_buffered(_filled(20), 0)), 20)


@pytest.mark.parametrize("block, channels", [(32, 64), (32, 128), (128, 64), (256, 128)])
def test_room_in_a_large_cache_ends_with_whole_tiles_of_scales(block, channels):
    """Of 8 groups of 32 tokens each, however many groups a block has; smaller caches grow by blocks."""
    slots, rows = 33024, 1032
    encode = functools.partial(affine, bits=2, key_group=32, value_group=8, block=block, scale_dtype="float32")
    reserved = lambda dense: BlockedSegment.from_dense(dense, encode, block).reserve(64)
    empty = lambda size: Segment.empty(B, K, size, channels, jnp.float32)
    grown = lambda size: jax.eval_shape(lambda: reserved(empty(size)))
    body = grown(32768).body
    k, v = body.k.packed, body.v.packed
    assert body.pos.shape[2] == slots and k.affine.shape[2] == rows and v.affine.shape[3] == slots
    assert k.words.shape == v.words.shape == (B, K, slots * channels // 16 // 128, 128)
    assert grown(2048).body.pos.shape[2] == 2048 + max(block, 64)
    dense = lambda size: jax.eval_shape(lambda x: x.reserve(1), _dense(size))
    assert dense(16384).k.shape[2] == 16392 and dense(4096).k.shape[2] == 4097


def test_a_buffered_segment_attends_to_body_and_tail_and_says_their_mass():
    segment, queries = _buffered(_filled(21), 8), _queries([10, 20])
    dense = segment.dense()
    want = attention(queries.rotated, dense.k, dense.v, queries.pos, dense.pos)
    part = _attend(segment, queries)
    np.testing.assert_allclose(part.out, want.out, **CLOSE)
    np.testing.assert_allclose(_mass(segment, queries, part.lse), want.probability.sum(axis=1), **CLOSE)


# --- bytes --------------------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    # 2 rows, 2 heads, 12 slots: keys and values of 8 float32, one position.
    assert kvjax.nbytes(_filled(12)) == 2 * 2 * 12 * (2 * 8 * 4 + 4)
    # A body of 24 slots of 8 bits, scale and zero (float32) per channel of 4 tokens and per token of 4 channels;
    # a dense tail of 8.
    body = 2 * 2 * 24 * (2 * 8 + 2 * 4 * 8 // 4 + 2 * 4 * 8 // 4 + 4)
    assert kvjax.nbytes(_buffered(_filled(16), 8)) == body + 2 * 2 * 8 * (2 * 8 * 4 + 4)
    cache = kvjax.empty_cache(batch=3, layers=5, kv_heads=2, head_dim=8, slots=7, dtype=jnp.bfloat16)
    assert kvjax.nbytes(cache) == 5 * 3 * 2 * 7 * (2 * 8 * 2 + 4) + 4 * 3
    assert kvjax.nbytes(jax.eval_shape(lambda: cache)) == kvjax.nbytes(cache)


def test_kept_tokens_average_layers_and_heads():
    # Row 0: layers of 4 and 2 tokens; row 1: 4 and, in one of two heads, 1.
    second = _filled(2).drop(jnp.array([[[0, 0], [0, 0]], [[1, 1], [0, 1]]], bool))
    cache = kvjax.Cache((LayerCache((_filled(4, 6),)), LayerCache((second,))), jnp.zeros(2, jnp.int32))
    assert kvjax.kept_tokens(cache).tolist() == [3.0, 2.25]
