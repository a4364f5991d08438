"""Slots in pages under an index: queries read what papers choose, and what is read is attended to exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import indices, methods
from kvjax.segments.slots import few_highest
from tests.kvjax import papers
from tests.kvjax.slot_arrays import ROPE, H, K, T, seen_of, slots_cache
from tests.quick_jit import quick_jit

G, LENGTHS = 2, (20, 14)
CLOSE = dict(rtol=2e-6, atol=2e-6)  # float32, other orders of summation


def _cache(transform, seed=0, lengths=LENGTHS, layers=1):
    """Layers after a transform, the rotated keys and the values [B, K, T, H] in them."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, len(lengths), K, T, H)).astype(np.float32)
    cache, _ = quick_jit(transform.init)(slots_cache(k, lengths, v, layers), seen_of(lengths, layers=layers))
    return cache, k, v


@functools.partial(quick_jit, static_argnames="window")
def _read(layer, queries, window=None):
    """What queries choose, and what they read of it."""
    chosen = layer.choose(queries, window=window)
    return chosen, layer.attend(queries, window=window, chosen=chosen)


_read_given = quick_jit(lambda layer, queries, chosen: layer.attend(queries, chosen=chosen).out)


def _queries(count=1, lengths=LENGTHS, seed=1) -> kvjax.Queries:
    """The next `count` queries of every row."""
    raw = np.random.default_rng(seed).normal(size=(len(lengths), count, K * G, H)).astype(np.float32)
    pos = jnp.int32(lengths)[:, None] + jnp.arange(count)
    return kvjax.Queries(jnp.asarray(raw), pos, ROPE, ahead=jnp.arange(count)[None])


def _attend(q, k, v):
    """NumPy attention of [G, H] to [n, H], float64."""
    logits = q.astype(np.float64) @ k.T * H**-0.5
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) @ v


def _double_sparsity(read):
    return methods.double_sparsity({"strength": jnp.float32([[[1, 4, 3, 2], [9, 0, 1, 8]]])}, read, 2, dense_layers=())


LABELS = ([1, 2], [0, 3])
# What builds the transform, tokens of a page and of the tail, and what the paper chooses of the body of a head.
CHOICES = {
    "quest": (lambda: methods.quest(12, 4, ()), 4, 4, lambda q, k, h: papers.quest(q, k, 4, 2)),
    "retrieval_attention": (
        lambda: methods.retrieval_attention(16 + 5, sinks=1, recent=0),
        1,
        16,
        lambda q, k, h: papers.nearest(q, k, 5, sinks=1),
    ),
    "double_sparsity": (
        lambda: _double_sparsity(16 + 5),
        1,
        16,
        lambda q, k, h: papers.double_sparsity(q, k, np.array(LABELS[h]), 5),
    ),
    "sparq": (lambda: methods.sparq(16 + 5, r=2, recent=0), 1, 16, lambda q, k, h: papers.sparq(q, k, 2, 5)),
    "shadowkv": (
        lambda: methods.shadowkv(4 + 8, 1.0, page=4, outliers=1, recent=0),
        4,
        4,
        lambda q, k, h: papers.shadowkv(q, k, 4, 1, 2),
    ),
    "mpcache": (
        lambda: kvjax.select(
            indices.Bounds(blend=0.6, agree="sum"), 12, page=4, residual=4, sinks=1, dense_layers=()
        ),
        4,
        4,
        lambda q, k, h: papers.mpcache_dynamic(q, k, 4, 0.6, 2),
    ),
}


@pytest.mark.parametrize("name, count", [(n, c) for n in CHOICES for c in (1, 3) if c == 1 or n in ("quest", "sparq")])
def test_queries_read_what_the_paper_chooses(name, count):
    build, page, block, paper = CHOICES[name]
    cache, k, v = _cache(build())
    queries = _queries(count)
    chosen, (out, _) = _read(cache.layers[0], queries)
    q = np.asarray(queries.rotated).reshape(len(LENGTHS), count, K, G, H)
    for row, length in enumerate(LENGTHS):
        in_body = length // block * block
        for head in range(K):
            keys, values = k[row, head, :length], v[row, head, :length]
            for t in range(count):
                if in_body:
                    pages = paper(q[row, t, head], keys[:in_body].astype(np.float64), head)
                    there = np.asarray(chosen.valid[row, head, t])
                    assert sorted(np.asarray(chosen.pages[row, head, t])[there].tolist()) == pages.tolist()
                    slots = (pages[:, None] * page + np.arange(page)).reshape(-1)
                else:
                    slots = np.zeros(0, int)
                slots = np.concatenate([slots, np.arange(in_body, length)])
                expected = _attend(q[row, t, head], keys[slots], values[slots])
                np.testing.assert_allclose(out[row, t, head * G : (head + 1) * G], expected, rtol=1e-5, atol=1e-5)


def test_rekv_reads_the_same_blocks_in_every_head():
    cache, k, _ = _cache(methods.rekv(12, page=4, sinks=0, recent=0))
    raw = np.asarray(kvjax.re_rotate(jnp.asarray(k), -jnp.arange(T), ROPE), np.float64)
    queries = _queries()
    chosen, _ = _read(cache.layers[0], queries)
    for row, length in enumerate(LENGTHS):
        expected = papers.rekv(np.asarray(queries.raw)[row, 0], raw[row, :, : length // 4 * 4], 4, 2)
        for head in range(K):
            assert sorted(chosen.pages[row, head, 0].tolist()) == expected.tolist()


def test_tidaldecode_reads_in_later_layers_what_a_layer_found_that_reads_everything():
    cache, k, v = _cache(methods.tidaldecode(16 + 2, select_at=(1,)), layers=3)
    assert isinstance(cache.layers[0].segments[-1], kvjax.Segment)  # before the first choice: as it was
    queries = _queries()
    chosen, (everything, _) = _read(cache.layers[1], queries)
    full, _, _ = _cache(kvjax.identity())
    np.testing.assert_allclose(everything, _read(full.layers[0], queries)[1].out, **CLOSE)
    assert cache.layers[2].choose(queries, given=chosen) is chosen
    q = np.asarray(queries.rotated).reshape(2, K, G, H)
    out = _read_given(cache.layers[2], queries, chosen)
    for head in range(K):
        slots = np.concatenate([papers.nearest(q[0, head], k[0, head, :16].astype(np.float64), 2), np.arange(16, 20)])
        expected = _attend(q[0, head], k[0, head, slots], v[0, head, slots])
        np.testing.assert_allclose(out[0, 0, head * G : (head + 1) * G], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="given must be the choice of an earlier layer"):
        cache.layers[2].attend(queries)


def test_reading_everything_is_the_same_representation_bit_by_bit():
    codes = kvjax.quantize(4, key_group=4, value_group=4, residual=8)
    for read in (1.0, 64):
        pages = kvjax.select(indices.Bounds(), read, page=8, residual=8, dense_layers=())
        for each, plain in ((kvjax.chain(pages, codes), codes), (pages, None)):
            cache, _, _ = _cache(each)
            layer, queries = cache.layers[0], _queries()
            if plain is None:
                body = layer.segments[-1]
                expected = layer.with_tail(body.replace(body=body.body.stored))
            else:
                expected = _cache(plain)[0].layers[0]
            jax.tree.map(np.testing.assert_array_equal, _read(layer, queries)[1], _read(expected, queries)[1])


def test_the_order_of_pages_changes_nothing_also_where_they_tie():
    cache, _, _ = _cache(methods.quest(12, 4, ()))
    segment = cache.layers[0].segments[-1]
    body = segment.body
    equal = body.replace(summary=body.summary.at[:, :, 3].set(body.summary[:, :, 1]))
    order = jnp.array([4, 3, 0, 2, 1])

    def move(x):  # pages of 4 slots
        return x.reshape(*x.shape[:2], 5, -1, *x.shape[3:])[:, :, order].reshape(x.shape)

    for body in (body, equal):
        moved = body.replace(
            stored=jax.tree.map(move, body.stored), summary=body.summary[:, :, order], span=body.span[:, :, order]
        )
        results = [_read(cache.layers[0].with_tail(segment.replace(body=b)), _queries(3))[1] for b in (body, moved)]
        np.testing.assert_allclose(*(x.out for x in results), **CLOSE)
        np.testing.assert_allclose(*(x.lse for x in results), **CLOSE)


def test_pages_beyond_the_window_are_never_read():
    cache, _, _ = _cache(methods.quest(16, 4, ()))
    chosen, _ = _read(cache.layers[0], _queries(), window=9)
    there = np.asarray(chosen.valid)
    first = np.asarray(chosen.pages) * 4
    for row, length in enumerate(LENGTHS):
        assert (first[row] + 3 > length - 9)[there[row]].all()
        assert there[row].any()


def test_first_and_newest_pages_come_before_others():
    cache, _, _ = _cache(kvjax.select(indices.Bounds(), 12, page=4, sinks=2, recent=3, residual=4, dense_layers=()))
    chosen, _ = _read(cache.layers[0], _queries())
    assert sorted(chosen.pages[0, 0, 0].tolist()) == [0, 4]


def test_a_short_row_reads_the_fraction_of_its_own_prompt():
    cache, _, _ = _cache(kvjax.select(indices.Bounds(), 0.6, page=2, residual=2, dense_layers=()))
    valid = _read(cache.layers[0], _queries())[0].valid
    assert np.sum(valid, axis=-1)[:, 0, 0].tolist() == [5, 3]  # of 12 and 8 tokens, less the tail's 2


def test_bytes_read_are_those_of_the_formula():
    page, count = 4, 2
    cache, _, _ = _cache(methods.quest(12, page, ()))
    slot, tail = 2 * 4 * H + 4, 4
    pages = 2 * K * (T // page)
    chosen = 2 * K * count * page * slot + pages * (2 * 4 * H + 8)
    assert kvjax.bytes_read(cache) == chosen + 2 * K * tail * slot
    shapes = jax.eval_shape(lambda: cache)
    assert kvjax.bytes_read(shapes) == kvjax.bytes_read(cache)
    assert kvjax.bytes_read(shapes, 9) == 2 * K * (T + tail) * slot  # longer calls read everything
    cache, _, _ = _cache(methods.shadowkv(12, 0.5, page=page, outliers=1))
    chosen = 2 * K * count * page * (4 * H // 2 + 4 * H + 4) + pages * (4 * H + 4 + 8) + 2 * K * tail * slot
    bases = 2 * K * 4 * H * H // 2
    assert kvjax.bytes_read(jax.eval_shape(lambda: cache)) == kvjax.bytes_read(cache) == chosen + bases
    full, _, _ = _cache(kvjax.identity())
    assert kvjax.bytes_read(full) == kvjax.nbytes(full.layers)


def test_the_few_highest_are_those_of_a_sort():
    rng, choose, P = np.random.default_rng(0), quick_jit(few_highest, static_argnums=2), 12
    for count in 3 * (1, 4, 12):
        scores = rng.integers(0, 4, size=(2, K, P)).astype(np.float32)
        scores[rng.random(scores.shape) < 0.1] = np.nan
        pos = np.stack([np.stack([rng.permutation(50)[:P] for _ in range(K)]) for _ in range(2)])
        pos[rng.random(pos.shape) < 0.3] = -1
        protected = rng.random(pos.shape) < 0.2
        rows = jnp.int32([count, max(count - 2, 0)])
        index, valid = choose(scores, np.int32(pos), count, protected, rows)
        for b in range(2):
            for h in range(K):
                value = np.where(np.isnan(scores[b, h]), -np.inf, scores[b, h])
                newest_first = np.where(protected[b, h], -pos[b, h], pos[b, h])
                value = np.where(protected[b, h], 0, value)
                order = np.lexsort((newest_first, -value, ~protected[b, h]))
                expected = [i for i in order.tolist() if pos[b, h, i] >= 0][: int(rows[b])]
                found = np.asarray(index[b, h])[np.asarray(valid[b, h])]
                assert sorted(found.tolist()) == sorted(expected)


@pytest.mark.parametrize(
    "wrong, what",
    [
        (dict(read=0), "read must be at least 1 tokens"),
        (dict(read=1.5), r"read as a fraction of the prompt must be in \(0, 1\], got 1.5"),
        (dict(page=0), "page and each must be at least 1, got 0 and 8"),
        (dict(page=8, residual=12), "residual must be a multiple of the 8 tokens of a page, got 12"),
        (dict(sinks=-1), "sinks and recent must be at least 0, got -1 and 0"),
        (dict(choose_at=(3, 1)), r"choose_at must name layers in order, got \[3, 1\]"),
        (dict(key_rope="rank"), "key_rope must be 'stored' or 'at_attend', got 'rank'"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        kvjax.select(indices.Bounds(), **({"read": 16} | wrong))


def test_what_does_not_fit_the_cache_is_refused():
    with pytest.raises(ValueError, match="index must be one for each of the 1 layers, got 2"):
        _cache(kvjax.select([indices.Bounds()] * 2, 8, dense_layers=()))
    with pytest.raises(ValueError, match=r"choose_at must name some of the 1 layers, got \[4\]"):
        _cache(kvjax.select(indices.Exact(), 8, page=1, choose_at=[4]))
    with pytest.raises(ValueError, match="pages of 4 tokens must hold whole blocks"):
        pages = kvjax.select(indices.Bounds(), 8, page=4, residual=8, dense_layers=())
        _cache(kvjax.chain(pages, kvjax.quantize(4, key_group=8, value_group=4, residual=8)))
    with pytest.raises(ValueError, match="select cannot follow quantize: it needs"):
        kvjax.chain(kvjax.quantize(4), kvjax.select(indices.Bounds(), 8))
