"""Ragged, latent and split segments read what dense slots with the same contents would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import BlockedSegment, HeadsSegment, LatentSegment, Queries, RaggedSegment, Rope, Segment
from kvjax.segments.bases import Channels, Matrix
from kvjax.segments.ragged import SlotList
from kvjax.transforms.ring import as_ring
from pallas_kernels.partial import Partial, combine, combine_by_owner
from tests.kvjax.encoders import affine
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

B, K, G, H, S, T = 2, 3, 2, 8, 20, 4
N = K * G
ROPE = Rope.from_base(100.0, H)
CLOSE = dict(rtol=3e-5, atol=3e-5)  # float32 against float64, a few dozen slots

_attend = quick_jit(lambda part, queries, **how: part.attend(queries, **how), static_argnames=("window", "scale"))
_mass = quick_jit(lambda part, queries, lse, **how: part.mass(queries, lse, **how), static_argnames=("window", "scale"))

_dense = quick_jit(lambda part: part.dense())
_append = quick_jit(lambda part, *new: part.append(*new, ROPE))
_latent = quick_jit(LatentSegment.of)


def _slots(seed: int = 0, slots: int = S, **static) -> Segment:
    """Random keys and values at positions 0 .. slots - 1; row 1 has four tokens fewer."""
    k, v = jnp.float32(np.random.default_rng(seed).normal(size=(2, B, K, slots, H)))
    pos = jnp.arange(slots) + jnp.zeros((B, K, 1), jnp.int32)
    pos = pos.at[1, :, slots - 4 :].set(-1)
    return Segment.of(k, v, pos, **static)


def _queries(seed: int = 1) -> Queries:
    raw = jnp.float32(np.random.default_rng(seed).normal(size=(B, T, N, H)))
    return Queries(raw, jnp.array([[17, 18, 19, 20], [14, 15, 16, -1]]), ROPE)


def _assert_reads(segment, dense: Segment, queries: Queries, **how):
    """Same attention as dense slots, and the same as NumPy; same mass per query head, wherever a token lies."""
    got = _attend(segment, queries, **how)
    want = _attend(dense, queries, **how)
    np.testing.assert_allclose(got.out, want.out, **CLOSE)
    np.testing.assert_allclose(got.lse, want.lse, **CLOSE)
    total = lambda part: np.asarray(_mass(part, queries, want.lse, **how)).reshape(B, -1)
    # Every real query gives one unit of probability to each query head.
    np.testing.assert_allclose(total(segment).sum(axis=-1), total(dense).sum(axis=-1), **CLOSE)


# --- pages --------------------------------------------------------------------------------------------------------


def _keep(seed: int = 2) -> jax.Array:
    """Very different numbers of slots for every row and head, none at all for one of them."""
    share = np.array([[0.9, 0.1, 0.4], [0.0, 0.8, 0.2]])[..., None]
    return jnp.asarray(np.random.default_rng(seed).random((B, K, S)) < share)


@pytest.mark.parametrize("page", [1, 4, 7])
@pytest.mark.parametrize("window", [None, 6])
def test_pages_read_as_dense_slots_do(page, window):
    dense, keep = _slots(), _keep()
    keep &= dense.pos >= 0
    count = int(np.max(np.sum(-(-np.sum(keep, axis=-1) // page), axis=-1)))
    ragged = RaggedSegment.of_list(SlotList.of(dense), keep.reshape(B, -1), kv_heads=K, page=page, pages=count)
    assert ragged.pos.shape == (B, 1, count * page) and ragged.pages.pos.shape == (B, count, page)
    _assert_reads(ragged, dense.drop(~keep), _queries(), window=window)
    for row in range(B):  # each page holds one head's tokens, in order
        for head in range(K):
            pages = np.asarray(ragged.pages.pos)[row][np.asarray(ragged.owner)[row] == head]
            held = pages[pages >= 0]
            assert held.tolist() == np.flatnonzero(keep[row, head]).tolist()


def test_pages_may_be_quantized():
    dense = _slots()
    keep = (_keep() & (dense.pos >= 0)).reshape(B, -1)
    ragged = RaggedSegment.of_list(SlotList.of(dense), keep, kv_heads=K, page=8, pages=9)
    encode = lambda slots: affine(slots, bits=4, key_group=8, value_group=8)
    packed = quick_jit(lambda ragged: ragged.map_dense(encode, encode))(ragged)
    assert kvjax.nbytes(packed) < 0.45 * kvjax.nbytes(ragged)
    expanded = _dense(packed)
    np.testing.assert_allclose(_attend(packed, _queries()).out, _attend(expanded, _queries()).out, **CLOSE)
    occupied = (ragged.pages.pos >= 0)[..., None]
    error = np.abs(np.where(occupied, expanded.pages.k - ragged.pages.k, 0))
    assert 0 < error.max() <= 0.6 * 6 / 15  # half a step of 15 over a range of at most six


def test_no_slots_may_be_quantized():
    encode = lambda slots: affine(slots.no_slots(), bits=4, key_group=8, value_group=8)
    none = quick_jit(encode)(_slots())
    assert none.dense().k.shape == (B, K, 0, H)
    partial = _attend(none, _queries())
    assert not partial.out.any() and (np.asarray(partial.lse) == -np.inf).all()


def test_merging_by_owner_is_combine():
    rng = np.random.default_rng(0)
    owner = np.array([[2, 0, 2, 2, 0]])
    out, lse = jnp.float32(rng.normal(size=(1, 2, 10, 3))), jnp.float32(rng.normal(size=(1, 2, 10)) * 5)
    merged = quick_jit(combine_by_owner, static_argnums=2)(Partial(out, lse), jnp.asarray(owner), 3)
    for head in range(3):
        pages = np.flatnonzero(owner[0] == head)
        mine = np.s_[2 * head : 2 * head + 2]
        if not len(pages):
            assert (merged.lse[:, :, mine] == -jnp.inf).all() and (merged.out[:, :, mine] == 0).all()
            continue
        want = combine([Partial(out[:, :, 2 * p : 2 * p + 2], lse[:, :, 2 * p : 2 * p + 2]) for p in pages])
        np.testing.assert_allclose(merged.out[:, :, mine], want.out, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merged.lse[:, :, mine], want.lse, rtol=1e-5, atol=1e-6)


# --- coordinates --------------------------------------------------------------------------------------------------


def _axes(seed: int, width: int, rank: int, *lead: int) -> jax.Array:
    full = np.linalg.qr(np.random.default_rng(seed).normal(size=(*lead, width, width)))[0]
    return jnp.float32(full[..., :rank])


def _basis(seed: int, rank: int, mean: bool = True) -> Matrix:
    mu = jnp.float32(np.random.default_rng(seed + 1).normal(size=(K, H))) if mean else None
    return Matrix(_axes(seed, H, rank, 1, K), mu)


def _projected(x: np.ndarray, basis: Matrix) -> np.ndarray:
    """`mean + (x - mean) U U^T`, head by head in float64."""
    U = np.asarray(basis.matrix[0], np.float64)
    mean = 0.0 if basis.mean is None else np.asarray(basis.mean, np.float64)[:, None]
    return mean + np.einsum("bksh,khr,kir->bksi", np.asarray(x, np.float64) - mean, U, U)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("window", [None, 6])
def test_projected_slots_read_as_their_projection(mean, window):
    dense, key, value = _slots(), _basis(3, 3, mean), _basis(5, 5, mean)
    segment = LatentSegment.of(dense, key, value)
    assert segment.latent.k.shape == (B, K, S, 3) and segment.latent.v.shape == (B, K, S, 5)
    k, v = _projected(dense.k, key), _projected(dense.v, value)
    queries = _queries()
    out, lse, _ = attention(queries.rotated, k, v, queries.pos, dense.pos, window=window)
    got = _attend(segment, queries, window=window)
    np.testing.assert_allclose(got.out, out, **CLOSE)
    np.testing.assert_allclose(got.lse, lse, **CLOSE)
    want = dense.replace(k=jnp.float32(k), v=jnp.float32(v))
    np.testing.assert_allclose(segment.dense().k, k, **CLOSE)
    _assert_reads(segment, want, queries, window=window)


def test_the_program_of_a_projected_read_has_no_full_width_keys():
    segment = LatentSegment.of(_slots(slots=96), _basis(3, 3), _basis(5, 5))
    queries = _queries()
    three = Queries(queries.raw[:, :3], queries.pos[:, :3], ROPE)  # as many rows as channels would look alike
    text = jax.jit(lambda s, q: s.attend(q)).lower(segment, three).compile().as_text()
    assert f"[{B},{K},96,3]" in text
    assert f"[{B},{K},96,{H}]" not in text and f"[{B},{K},{H},96]" not in text


def test_new_tokens_are_projected_when_written():
    key, value = _basis(3, 3), _basis(5, 5)
    k, v = jnp.float32(np.random.default_rng(7).normal(size=(2, B, K, 6, H)))
    pos = jnp.array([[20, 21, 22, 23, 24, 25], [16, 17, 18, -1, -1, -1]])
    grown = _append(_latent(_slots(), key, value).reserve(6), k, v, pos)
    at_once = _latent(_append(_slots().reserve(6), k, v, pos), key, value)
    queries = _queries()._replace(pos=jnp.array([[22, 23, 24, 25], [16, 17, 18, -1]]))
    for a, b in zip(_attend(grown, queries), _attend(at_once, queries)):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_coordinates_may_be_quantized():
    segment = _latent(_slots(slots=32), _basis(3, 4), _basis(5, 8))
    encode = lambda slots: affine(slots, bits=8, key_group=8, value_group=4)
    tail = lambda slots: BlockedSegment.from_dense(slots, encode, 8)
    packed = quick_jit(lambda segment: segment.map_dense(encode, tail))(segment)
    assert isinstance(packed.latent, BlockedSegment)
    got, want = _attend(packed, _queries()), _attend(segment, _queries())
    np.testing.assert_allclose(got.out, want.out, atol=0.05)  # 8 bits of a range of six
    np.testing.assert_allclose(got.out, _attend(_dense(packed), _queries()).out, **CLOSE)


@pytest.mark.parametrize("slots", [20, 1100])  # one tile, and more than two
def test_joint_coordinates_of_unrotated_keys_are_expanded_and_rotated(slots):
    pos = jnp.arange(slots) + jnp.zeros((B, K, 1), jnp.int32)
    dense = _slots(slots=slots).with_slots(pos=pos).replace(key_rope="at_attend")
    rank = 10
    axes = _axes(3, K * H, rank).reshape(1, K, H, rank), _axes(4, K * H, rank).reshape(1, K, H, rank)
    segment = LatentSegment.of(dense, *map(Matrix, axes), joint=True)
    assert segment.latent.k.shape == (B, 1, slots, rank) and segment.pos.shape == (B, K, slots)

    def projected(x, axes):
        U = np.asarray(axes, np.float64).reshape(K * H, rank)
        joint = np.asarray(x, np.float64).swapaxes(1, 2).reshape(B, slots, K * H)
        return (joint @ U @ U.T).reshape(B, slots, K, H).swapaxes(1, 2)

    k, v = projected(dense.k, axes[0]), projected(dense.v, axes[1])
    want = dense.replace(k=jnp.float32(k), v=jnp.float32(v))
    queries = _queries()._replace(pos=jnp.full((B, T), slots))
    _assert_reads(segment, want, queries)


def test_pruned_channels_are_zero_to_the_reader():
    rng = np.random.default_rng(0)
    index = jnp.asarray([[sorted(rng.permutation(H)[:5]) for _ in range(K)] for _ in range(B)])
    dense = _slots()
    segment = LatentSegment.of(dense, Channels(index, H), None)
    kept = np.zeros((B, K, H), bool)
    np.put_along_axis(kept, np.asarray(index), True, axis=-1)
    _assert_reads(segment, dense.replace(k=dense.k * kept[:, :, None]), _queries())
    np.testing.assert_allclose(segment.dense().k, dense.k * kept[:, :, None])


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [((0, 2), (1,)), ((), (0, 1, 2)), ((1,), (0, 2))])
def test_split_heads_read_and_write_as_one_segment(heads):
    dense = _slots()
    grow = lambda part, index: part.resize(S + 7 * index)
    split = quick_jit(lambda dense: HeadsSegment.of(dense, heads, grow))(dense)
    assert split.pos.shape[:2] == (B, K)
    _assert_reads(split, dense, _queries())
    np.testing.assert_array_equal(np.sort(_dense(split).pos)[..., -S:], np.sort(dense.pos))
    k, v = jnp.float32(np.random.default_rng(7).normal(size=(2, B, K, 3, H)))
    pos = jnp.array([[20, 21, 22], [16, 17, -1]])
    queries = _queries()._replace(pos=jnp.array([[20, 21, 22, 22], [16, 17, 17, -1]]))
    a, b = (_append(part.reserve(3), k, v, pos) for part in (split, dense))
    _assert_reads(a, b, queries)


def test_streaming_heads_forget_and_full_heads_do_not():
    ring = lambda part, index: part if index == 0 else as_ring(part, 6, 2)
    split = HeadsSegment.of(_slots(), ((1,), (0, 2)), ring)
    assert np.asarray(split.pos[0, 1])[:S].tolist() == list(range(S))
    for head in (0, 2):
        held = np.asarray(split.pos[0, head])
        assert sorted(held[held >= 0]) == [0, 1, 16, 17, 18, 19]
