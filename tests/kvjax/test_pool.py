"""One pool of pages for all layers: each layer reads its own, and its share of the budget is the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Queries, Rope, Segment
from kvjax.segments.pooled import pool_layers
from kvjax.segments.ragged import RaggedSegment, SlotList
from kvjax.transforms.evict_across_layers import proportional
from kvjax.transforms.evict_by_head import choose, pages_for
from pallas_kernels.decode_attention import pages
from tests.kvjax import papers
from tests.kvjax.encoders import affine
from tests.quick_jit import quick_jit

L, K, G, H, S, T = 4, 2, 2, 8, 20, 3
# How much of a head is kept: two rows whose layers begin at different pages; layers and heads with nothing at all.
SHARES = np.array([[[0.9, 0.1], [0, 0], [0.2, 1.0], [0.5, 0.4]], [[0, 0.1], [1, 0.9], [0, 0], [0.3, 1.0]]])
CLOSE = dict(rtol=3e-5, atol=3e-5)  # float32, a few dozen slots in another order


def _layers(batch: int) -> tuple[list[Segment], jax.Array]:
    """The slots of every layer, and bool[B, L, K, S], which of them are kept."""
    rng = np.random.default_rng(0)
    k, v = jnp.float32(rng.normal(size=(2, L, batch, K, S, H)))
    pos = jnp.broadcast_to(jnp.arange(S), (batch, K, S))
    keep = rng.random((batch, L, K, S)) < SHARES[:batch, ..., None]
    return [Segment.of(k[layer], v[layer], pos) for layer in range(L)], jnp.asarray(keep)


_attend = quick_jit(lambda segment, queries, window: segment.attend(queries, window=window), static_argnums=2)

_dense = quick_jit(lambda segment: segment.dense())


def _pool(layers, keep, page: int):
    together = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *layers)
    pages = pages_for(L * K, int(keep.sum(axis=-1).mean(axis=(1, 2)).max()) + 1, page)

    def of(slots, keep):
        held = SlotList.of(slots)
        flat = keep.reshape(held.owner.shape)
        return pool_layers(RaggedSegment.of_list(held, flat, kv_heads=L * K, page=page, pages=pages), L)

    return quick_jit(of)(together, keep)


def _queries(batch: int) -> Queries:
    raw = jnp.float32(np.random.default_rng(1).normal(size=(batch, T, K * G, H)))
    return Queries(raw, jnp.array([[18, 19, 20], [14, 15, -1]])[:batch], Rope.from_base(100.0, H))


@pytest.mark.parametrize("batch, page, tile", [(1, 4, 2), (2, 1, 4), (2, 8, 64)])
def test_every_layer_reads_its_own_pages(batch, page, tile, monkeypatch):
    monkeypatch.setattr(pages, "_TILE", tile)
    layers, keep = _layers(batch)
    pool, views = _pool(layers, keep, page)
    queries = _queries(batch)

    def read(pool, view, queries, window):
        return view.inlined({"pool": pool}).attend(queries, window=window)

    attend = quick_jit(read, static_argnums=3)
    mass_of = quick_jit(lambda segment, queries, lse: segment.mass(queries, lse, window=6, scale=None).sum(axis=(1, 2)))
    for index, (layer, view) in enumerate(zip(layers, views)):
        kept = layer.drop(~keep[:, index])
        segment = view.inlined({"pool": pool})
        for window in (None, 6):
            got, want = attend(pool, view, queries, window), _attend(kept, queries, window)
            np.testing.assert_allclose(got.out, want.out, **CLOSE)
            np.testing.assert_allclose(got.lse, want.lse, **CLOSE)
        mass, total = (mass_of(part, queries, want.lse) for part in (segment, kept))
        np.testing.assert_allclose(mass, total, **CLOSE)
        for row, head in np.ndindex(batch, K):
            held = np.asarray(segment.pos)[row][np.asarray(segment.pool.of_slots(segment.owner))[row] == head]
            assert sorted(held[held >= 0]) == np.flatnonzero(keep[row, index, head]).tolist()


def test_a_layer_reads_no_more_tiles_than_it_has(monkeypatch):
    monkeypatch.setattr(pages, "_TILE", 2)
    layers, keep = _layers(2)
    pool, views = _pool(layers, keep, 4)
    tiles = []
    monkeypatch.setattr(pages, "fold", lambda attend, count: tiles.append(int(count)))
    for view in views:
        view.inlined({"pool": pool}).attend(_queries(2), window=None)
    counts = [-(-np.asarray(keep[:, layer].sum(axis=-1)) // 4) for layer in range(L)]
    assert tiles == [-(-int(count.sum(axis=1).max()) // 2) for count in counts]


def test_the_pool_may_be_quantized():
    layers, keep = _layers(2)
    pool, views = _pool(layers, keep, 8)
    encode = lambda slots: affine(slots, bits=8, key_group=8, value_group=8)
    packed = quick_jit(lambda pool: pool.map_dense(encode, encode))(pool)
    assert kvjax.nbytes(packed) < 0.6 * kvjax.nbytes(pool)
    for view in views:
        segment = view.inlined({"pool": packed})
        got, want = (_attend(x, _queries(2), None) for x in (segment, _dense(segment)))
        np.testing.assert_allclose(got.out, want.out, **CLOSE)


@pytest.mark.parametrize("budget, sharpness", [(4, 0.5), (9, 1.0), (14, 2.0)])
def test_cakes_cascade_ends_where_one_split_of_the_budget_does(budget, sharpness):
    L, K, S, recent = 7, 2, 24, 5
    rng = np.random.default_rng(budget)
    preference = np.exp(sharpness * rng.normal(size=(2, L)))
    scores = rng.permuted(np.tile(np.arange(L * K * S) / 1e3, (2, 1)), axis=1).reshape(2, L * K, S)
    pos = jnp.broadcast_to(jnp.arange(S), scores.shape)
    held = SlotList.of(Segment.of(jnp.zeros((*pos.shape, 1)), jnp.zeros((*pos.shape, 1)), pos))
    split = proportional(jnp.float32(preference))
    keep = quick_jit(lambda *of: choose(*of, split, L * K, 0, recent))(
        jnp.float32(scores).reshape(held.owner.shape), held, jnp.array([budget + recent, budget + recent])
    )
    keep = keep.reshape(scores.shape)
    for row in range(2):
        older = scores[row, :, : S - recent].reshape(L, K, -1)
        held = papers.cake_cascade(preference[row], older, budget)
        for index, (layer, head) in enumerate(np.ndindex(L, K)):
            want = [*held[layer][head], *range(S - recent, S)]
            assert np.flatnonzero(keep[row, index]).tolist() == want
        assert keep[row].sum() == L * K * (budget + recent)


def test_layers_of_no_preference_get_the_same():
    scores, owner = jnp.zeros((1, 6 * 8)), jnp.repeat(jnp.arange(6), 8)[None]
    assert proportional(jnp.zeros((1, 3)))(scores, owner, jnp.array([5]), 6).tolist() == [[5] * 6]
    # Two layers of 8 slots at most, 15 to split: the first is full, what it leaves goes to the others.
    counts = proportional(jnp.array([[100.0, 1.0, 1.0]]))(scores, owner, jnp.array([5]), 6)
    assert counts.tolist() == [[8, 8, 4, 4, 3, 3]]
