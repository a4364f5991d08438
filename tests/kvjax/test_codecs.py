"""Every codec in every layout, on small arrays: what is read, received, written, moved and counted."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Queries, Ring, Rope, Rows, Segment, rotate, sharding
from kvjax.codecs import (
    Affine,
    Corrected,
    Fourier,
    Halves,
    Levels,
    MeanLevels,
    Pairs,
    Product,
    SignSketch,
    Sparse,
    UnitNorm,
)
from kvjax.segments import BlockedSegment, CompensatedSegment, HeadsSegment, LatentSegment, RaggedSegment
from kvjax.segments.bases import Matrix
from kvjax.segments.hadamard import Hadamard
from kvjax.segments.ragged import SlotList
from kvjax.segments.slots import LAST
from pallas_kernels.logits import SoftCap
from tests.kvjax.slot_arrays import seen_of, slots_cache
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

B, K, N, H, S, T = 2, 2, 4, 16, 48, 3
ROPE = Rope.from_base(100.0, H)
CLOSE = dict(rtol=3e-5, atol=3e-5)  # float32 against float64, a few dozen slots
LENGTHS = (S, S - 11)

mesh_of = lambda text: sharding.make_mesh(text, jax.devices()[:8])
_attend = quick_jit(lambda part, queries, **how: part.attend(queries, **how), static_argnames=("window",))
_mass = quick_jit(lambda part, queries, lse, **how: part.mass(queries, lse, **how), static_argnames=("window",))
_dense = quick_jit(lambda part: part.dense())
_append = quick_jit(lambda part, k, v, pos: part.append(k, v, pos, ROPE))


def _blocks(bits, axis="channel", group=8, block=16):
    return Affine.of_blocks(bits, group, axis, block=block)


def _slotwise(bits, group=8):
    return Affine.of_slots(bits, group)


def _codebook(seed):
    return Product.of(jnp.float32(np.random.default_rng(seed).normal(size=(H // 2, 16, 2))))


def _corrected(axis, bits=2):
    return Corrected(Affine.of_blocks(bits, 8, axis, block=16), None, None, axis, 16, 2, 2, 0.1, "float32")


NARROW = jnp.zeros((), jnp.bfloat16)
WIDE = jnp.zeros(())
CODECS = {
    "float32": (WIDE, WIDE),
    "bfloat16": (NARROW, NARROW),
    "int8 slots": (_slotwise(8), _slotwise(8)),
    "int4 slots": (_slotwise(4), _slotwise(4, None)),
    "int2 slots": (_slotwise(2), _slotwise(2)),
    "int8 keys, int4 values": (_slotwise(8), _slotwise(4)),
    "2 bits of levels": (UnitNorm(Levels.gaussian(2), None),) * 2,
    "3 bits of levels": (UnitNorm(Levels.gaussian(3), None),) * 2,
    "4 bits of levels, int8 values": (UnitNorm(Levels.gaussian(4), None), _slotwise(8)),
    "centroids": (_codebook(1), _codebook(2)),
    "dense keys, int4 values": (WIDE, _slotwise(4)),
    "int3 slots": (_slotwise(3), _slotwise(3, None)),
    "kivi 4": (_blocks(4), _blocks(4, "token")),
    "kivi 3": (_blocks(3, block=32), _blocks(3, "token", block=32)),
    "kivi 2, values over tokens": (_blocks(2), _blocks(2)),
    "kivi, 4 bits and 2": (_blocks(4), _blocks(2, "token")),
    "corrected 2 bits": (_corrected("channel"), _corrected("token")),
    "half of the entries": (Sparse(None, None, 0.5), Sparse(None, None, 0.7, dtype="bfloat16")),
    "pairs": (Pairs(None, None),) * 2,
    "sketch, 2 bits": (SignSketch(None, None, None, 2.0, 3, 16), _blocks(2, "token")),
    "2 bits or 1, three states": (
        Halves(_blocks(2, block=32), Fourier(MeanLevels(None, None, 2, 8)), 0.25),
        MeanLevels(None, None, 3, 8),
    ),
}
LONG = {"kivi 3", "sketch, 2 bits", "2 bits or 1, three states"}  # words of 32 slots
BLOCKS = {name for name in CODECS if "kivi" in name or "corrected" in name} | LONG


def _slots(seed: int = 0, **static) -> Segment:
    """Random tokens of two rows in slots of any order, each head's its own; a few slots are empty."""
    rng = np.random.default_rng(seed)
    k, v = jnp.float32(rng.normal(size=(2, B, K, S, H)))
    order = np.argsort(rng.random((B, K, S)), axis=-1)
    return Segment.of(k, v, jnp.int32(np.where(order < np.array(LENGTHS)[:, None, None], order, -1)), **static)


def _queries(seed: int = 1) -> Queries:
    raw = jnp.float32(np.random.default_rng(seed).normal(size=(B, T, N, H)))
    return Queries(raw, jnp.array([[20, S - 1, S + 3], [S - 12, S, -1]]), ROPE)


def _stored(slots: Segment, codec: str) -> Segment:
    return slots.encoded(*CODECS[codec])


def _turn(seed: int) -> Matrix:
    return Matrix(jnp.float32(np.linalg.qr(np.random.default_rng(seed).normal(size=(1, K, H, H)))[0]))


def _pages(slots: Segment, codec: str) -> RaggedSegment:
    keep = (slots.pos >= 0) & (slots.pos % jnp.array([2, 5])[:, None] != 1)  # heads hold different numbers
    ragged = RaggedSegment.of_list(SlotList.of(slots), keep.reshape(B, -1), kv_heads=K, page=16, pages=2 * K * S // 16)
    return ragged.map_dense(None, None) if codec is None else ragged.map_dense(lambda x: _stored(x, codec), None)


LAYOUTS = {
    "rows": _stored,
    "ring": lambda slots, codec: _stored(slots.replace(layout=Ring(2)), codec),
    "blocks": lambda slots, codec: BlockedSegment.from_dense(
        slots, lambda x: _stored(x, codec), 32 if codec in LONG else 16
    ),
    "pages": _pages,
    "heads": lambda slots, codec: HeadsSegment.of(
        slots, ((1,), (0,)), lambda part, i: _stored(part, codec) if i else part
    ),
    "basis": lambda slots, codec: LatentSegment.of(slots, _turn(3), _turn(4)).map_dense(
        None, lambda x: _stored(x, codec)
    ),
    "signs": lambda slots, codec: LatentSegment.of(slots, Hadamard(seed=0), Hadamard(seed=0)).map_dense(
        None, lambda x: _stored(x, codec)
    ),
    "un-rotated": lambda slots, codec: _stored(slots.replace(key_rope="at_attend"), codec),
    "un-rotated in a basis": lambda slots, codec: LatentSegment.of(
        slots.replace(key_rope="at_attend"), _turn(3), _turn(4)
    ).map_dense(None, lambda x: _stored(x, codec)),
    "un-rotated in channels of all heads": lambda slots, codec: LatentSegment.of(
        slots.replace(key_rope="at_attend"), Hadamard(heads=K), None
    ).map_dense(None, lambda x: _stored(x, codec)),
    "with a mean": lambda slots, codec: CompensatedSegment.of(slots, slots.replace(layout=Ring(2))).map_dense(
        None, lambda x: _stored(x, codec)
    ),
}
# Blocks are never overwritten slot by slot: a ring takes codes of single slots.
PAIRS = [(c, l) for c in CODECS for l in LAYOUTS if not (c in BLOCKS and l in ("ring", "with a mean"))]
FAST = {(c, "rows") for c in CODECS} | {("int4 slots", layout) for layout in LAYOUTS} | {("kivi 4", "blocks")}
_pair = lambda pair: pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)


@pytest.mark.parametrize("codec, layout", list(map(_pair, PAIRS)))
def test_codes_read_as_what_they_decode_to(codec, layout):
    part = quick_jit(functools.partial(LAYOUTS[layout], codec=codec))(_slots())
    queries, window = _queries(), 30 if layout == "rows" else None
    got = _attend(part, queries, window=window)
    dense = _dense(part)
    flat = dense
    if layout == "pages":  # by head: pages of the same owner side by side
        flat = _by_head(dense)
    keys = rotate(flat.k, flat.pos, ROPE) if flat.key_rope == "at_attend" else flat.k
    want = attention(queries.rotated, keys, flat.v, queries.pos, flat.pos, bias=flat.bias, window=window)
    close = dict(rtol=1e-2, atol=1e-2) if codec == "bfloat16" else CLOSE  # queries and probabilities are rounded to it
    np.testing.assert_allclose(got.out, want.out, **close)
    np.testing.assert_allclose(got.lse, want.lse, **close)
    received = np.asarray(_mass(part, queries, got.lse, window=window))
    seen = np.isfinite(np.asarray(got.lse)).sum(axis=(1, 2))
    np.testing.assert_allclose(received.reshape(B, -1).sum(axis=-1), seen, rtol=1e-4)  # each query gives one in all
    if layout == "rows":
        np.testing.assert_allclose(received, want.probability.sum(axis=1), **close)


def _by_head(ragged: RaggedSegment) -> Segment:
    """Dense slots [B, K, P * page]: every page under its KV head, empty elsewhere."""
    pages = ragged.pages
    mine = ragged.owner[:, None, :, None] == jnp.arange(K)[:, None, None]  # [B, K, P, 1]
    spread = lambda x: jnp.broadcast_to(x[:, None], (B, K, *x.shape[1:])).reshape(B, K, -1, *x.shape[3:])
    pos = jnp.where(mine, pages.pos[:, None], -1).reshape(B, K, -1)
    return Segment.of(spread(pages.k), spread(pages.v), pos, key_rope=pages.key_rope)


@pytest.mark.parametrize("codec", ["int8 slots", "4 bits of levels", "kivi 4"])
def test_keys_that_are_the_values_are_read_as_both(codec):
    """Multi-head latent attention: norms that are kept apart belong to the values, too."""
    keys = {"4 bits of levels": UnitNorm(Levels.gaussian(4), None)}.get(codec) or CODECS[codec][0]
    slots = _slots()
    part = slots.replace(v=None).encoded(keys, keys)
    queries = _queries()
    got, dense = _attend(part, queries), _dense(part)
    assert dense.v is None
    want = attention(queries.rotated, dense.k, dense.k, queries.pos, dense.pos)
    np.testing.assert_allclose(got.out, want.out, **CLOSE)


def test_a_packed_ring_holds_no_more_tokens_than_an_exact_one():
    """Words of eight slots: what a budget of five lacks of one stays closed, in a batch and alone."""
    pack = kvjax.quantize(4, key_axis="token", key_group=8, value_group=8, residual=0)
    rng = np.random.default_rng(0)
    k = rng.normal(size=(2, K, 24, H))
    held = []
    for transform in (kvjax.ring(5, sinks=2), kvjax.chain(kvjax.ring(5, sinks=2), pack)):
        init = quick_jit(lambda cache, seen, transform=transform: transform.init(cache, seen)[0])
        ring = init(slots_cache(k, [24, 13]), seen_of([24, 13], prompt_slots=24)).layers[0].segments[-1]
        for t in range(24, 36):
            ring = _append(ring, *jnp.ones((2, 2, K, 1, H)), jnp.array([[t], [t - 11]]))
        held.append([sorted(p for p in row if p >= 0) for row in np.asarray(ring.pos)[:, 0].tolist()])
    assert held[0] == held[1] == [[0, 1, 33, 34, 35], [0, 1, 22, 23, 24]]


@pytest.mark.float8
@pytest.mark.parametrize("dtype, bits", [("float8_e4m3fn", 3), ("float8_e5m2", 2)])
def test_8_bit_floats_with_a_scale_for_each_token_clip_nothing(dtype, bits):
    k = 1e4 * np.random.default_rng(0).normal(size=(1, K, 40, H))  # beyond the 448 of e4m3fn
    transform = kvjax.methods.fp8(dtype, scale="token")
    init = quick_jit(lambda cache, seen: transform.init(cache, seen)[0])
    part = init(slots_cache(k, [40]), seen_of([40], prompt_slots=40)).layers[0].segments[-1]
    assert kvjax.nbytes(part) == K * 40 * (2 * H + 2 * 4 + 4)
    dense, queries = _dense(part), Queries(_queries().raw[:1, :1] / 1e4, jnp.array([[40]]), ROPE)
    large = np.abs(k) > 1e2  # smaller ones are subnormal beside the others of their token
    assert (np.abs(dense.k - k)[large] <= np.abs(k)[large] * 2.0 ** -(bits + 1) * 1.01).all()
    want = attention(queries.rotated, dense.k, dense.v, queries.pos, dense.pos)
    np.testing.assert_allclose(_attend(part, queries).out, want.out, rtol=1e-4, atol=1.0)  # of values of 10,000


def test_codes_may_begin_without_slots():
    for codec in SLOTWISE:
        none = _slots().first(0)
        part = quick_jit(lambda none, codec=codec: _stored(none, codec).reserve(3))(none)
        assert part.pos.shape[2] == max(3, part.block) if part.block > 3 else 3
        after = _append(part, *jnp.ones((2, B, K, 1, H)), jnp.array([[7], [-1]]))
        assert np.asarray(after.pos)[0, 0].max() == 7 and np.asarray(after.pos)[1].max() == -1


SLOTWISE = [name for name in CODECS if name not in BLOCKS]


@pytest.mark.parametrize(
    "layout, codec",
    [
        pytest.param(layout, codec, marks=() if index % 2 == at else pytest.mark.slow)
        for at, layout in enumerate([Rows(), Ring(3)])
        for index, codec in enumerate(SLOTWISE)
    ],
)
def test_tokens_one_by_one_are_stored_as_tokens_at_once(codec, layout):
    k, v = jnp.float32(np.random.default_rng(7).normal(size=(2, B, K, 13, H)))
    pos = jnp.where(jnp.arange(13) < jnp.array([[13], [5]]), jnp.array([[60], [40]]) + jnp.arange(13), -1)
    begin = _stored(_slots(layout=layout).drop(_slots().pos % 5 == 2), codec).resize(2 * S)
    at_once = _append(begin, k, v, pos)
    one_by_one = begin
    for t in range(13):
        one_by_one = _append(one_by_one, k[:, :, t : t + 1], v[:, :, t : t + 1], pos[:, t : t + 1])
    a, b = (_in_order(part) for part in (at_once, one_by_one))
    np.testing.assert_array_equal(a.pos, b.pos)
    np.testing.assert_array_equal(a.k, b.k)
    np.testing.assert_array_equal(a.v, b.v)
    held = np.asarray(a.pos)[0, 0]
    held = held[held >= 0]
    assert set(range(60, 73)) <= set(held.tolist()) and len(set(held.tolist())) == len(held)


@quick_jit
def _in_order(part: Segment) -> Segment:
    return _zero_where_empty(part.dense().in_token_order())


def _zero_where_empty(dense: Segment) -> Segment:
    there = (dense.pos >= 0)[..., None]
    return dense.map_vectors(lambda x: jnp.where(there, x, 0)).with_slots(pos=jnp.maximum(dense.pos, -1))


@pytest.mark.parametrize("codec", SLOTWISE)
def test_codes_are_moved_without_being_decoded(codec):
    part = _stored(_slots(), codec)
    rng = np.random.default_rng(5)
    index = jnp.int32(np.argsort(rng.random((B, K, S)), axis=-1))[..., :29]
    valid = jnp.asarray(rng.random((B, K, 29)) < 0.8)
    taken = quick_jit(lambda part, index, valid: part.take(index, valid))(part, index, valid)
    block = part.block
    assert taken.pos.shape[2] == -(-29 // block) * block and (np.asarray(taken.pos)[..., 29:] < 0).all()
    want = np.take_along_axis(np.asarray(_dense(part).k), np.asarray(index)[..., None], axis=2)
    there = np.asarray(valid)[..., None]
    np.testing.assert_array_equal(np.asarray(_dense(taken).k)[:, :, :29] * there, want * there)
    order = jnp.int32(np.argsort(rng.random((B, K, S)), axis=-1))  # any order of slots reads the same
    shuffled = part.take(order, jnp.take_along_axis(part.pos, order, axis=-1) >= 0)
    for a, b in zip(_attend(shuffled, _queries()), _attend(part, _queries())):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("axes", ["seq:4,model:2", pytest.param("data:2,seq:2,model:2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "codec",
    ["int8 keys, int4 values", *(pytest.param(c, marks=pytest.mark.slow) for c in ("3 bits of levels", "centroids"))],
)
def test_shards_hold_what_one_device_does(codec, axes):
    k, v = jnp.float32(np.random.default_rng(7).normal(size=(2, B, K, 5, H)))
    pos = jnp.where(jnp.arange(5) < jnp.array([[5], [3]]), jnp.array([[S], [S - 11]]) + jnp.arange(5), -1)
    index = jnp.int32(np.argsort(np.random.default_rng(5).random((B, K, 2 * S)), axis=-1))[..., :64]

    def run(slots, queries, k, v, pos, index):
        part = _stored(slots.resize(2 * S), codec)
        at_once = part.append(k[:, :, :4], v[:, :, :4], pos[:, :4], ROPE)
        after = at_once.append(k[:, :, 4:], v[:, :, 4:], pos[:, 4:], ROPE)
        taken = after.take(index, jnp.take_along_axis(after.pos, index, axis=-1) >= 0)
        read = sharding.attend(after, queries, window=None, scale=None)
        received = sharding.mass(after, queries, read.lse, window=None, scale=None)
        return _zero_where_empty(after.dense()), _zero_where_empty(taken.dense()), read, received

    args = _slots(), _queries(), k, v, pos, index
    want = quick_jit(run)(*args)
    with sharding.use_mesh(mesh_of(axes)):
        got = quick_jit(run)(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), got, want)


def test_bytes_are_those_of_the_formulas():
    scales = lambda group: 2 * 2 * H / group
    numbers = {
        "float32": 8 * H,
        "bfloat16": 4 * H,
        "int8 slots": 2 * H + 2 * scales(8),
        "int4 slots": H + scales(8) + scales(H),
        "int2 slots": H / 2 + 2 * scales(8),
        "int8 keys, int4 values": H + H / 2 + 2 * scales(8),
        "2 bits of levels": 2 * (H / 4 + 4),
        "3 bits of levels": 2 * (3 * H / 8 + 4),
        "4 bits of levels, int8 values": H / 2 + 4 + H + scales(8),
        "centroids": 2 * H / 2 / 2,
        "dense keys, int4 values": 4 * H + H / 2 + scales(8),
        "int3 slots": 2 * 3 * H / 8 + scales(8) + scales(H),
        "kivi 4": H + 2 * scales(8),
        "kivi 3": 2 * 3 * H / 8 + 2 * scales(8),
        "kivi 2, values over tokens": H / 2 + 2 * scales(8),
        "kivi, 4 bits and 2": H / 2 + H / 4 + 2 * scales(8),
        # rank 2 in float32; a block of 16 has 2 outliers a channel of keys, a token has 2 of values, with their index
        "half of the entries": 2 * H / 8 + 4 * H / 2 + 2 * (H - int(0.7 * H)),
        "pairs": 2 * (H / 2 + 2),
        "sketch, 2 bits": 3 * H / 8 + 2 * 2 + 3 / 16 + H / 4 + scales(8),
        "2 bits or 1, three states": H / 4 * (1 / 4 + 4 / 8) + 3 * H / 4 * (1 / 8 + 2 / 8) + 4 + 2 * H / 8,
        "corrected 2 bits": H / 2 + 2 * scales(8) + 2 * 2 * 4 * (1 + H / 16) + 5 * (2 * H / 16 + 2),
    }
    shared = {"2 bits of levels": 2 * 16, "3 bits of levels": 2 * 32, "4 bits of levels, int8 values": 64}
    shared["centroids"] = 2 * 16 * H * 4
    for name in CODECS:
        part = jax.eval_shape(lambda: _stored(_slots(), name))
        slots = B * K * -(-S // part.block) * part.block
        assert kvjax.nbytes(part) == slots * (numbers[name] + 4) + shared.get(name, 0), name


@pytest.mark.parametrize("codec", ["kivi 4", "corrected 2 bits"])
def test_blocks_refuse_what_is_done_slot_by_slot(codec):
    part = _stored(_slots(), codec)
    with pytest.raises(TypeError, match="take whole blocks; append through a BlockedSegment"):
        part.append(part.dense().k[:, :, :1], part.dense().v[:, :, :1], jnp.full((B, 1), 50), ROPE)
    with pytest.raises(TypeError, match="take whole blocks; reserve through a BlockedSegment"):
        part.reserve(1)
    layer = kvjax.LayerCache((part,))
    with pytest.raises(ValueError, match="evict needs slots that can be kept and dropped one by one, got codes in"):
        kvjax.segments.segment.slot_tail(layer, "evict")


# --- a packed ring, and eviction over codes, as NumPy does it ------------------------------------------------------


def _rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """What one token's codes, with a scale over all channels, stand for: float32 as the codec stores it."""
    codec = Affine.of_slots(bits, None, scale_dtype="float32")
    x = jnp.float32(x)[None, None]
    return np.asarray(kvjax.codecs.encode_like(codec, x, jnp.ones(x.shape[:3], bool)).decode())[0, 0, : x.shape[2]]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_packed_ring_holds_its_sinks_and_its_newest_tokens(bits):
    sinks, slots, tokens = 3, 16, 70
    k, v = np.random.default_rng(0).normal(size=(2, 1, 1, tokens, H)).astype(np.float32)
    codec = Affine.of_slots(bits, None, scale_dtype="float32")
    ring = Segment.empty(1, 1, slots, H, jnp.float32, layout=Ring(sinks)).encoded(codec, codec)

    @quick_jit
    def run(ring):
        step = lambda ring, t: (ring.append(k_of(t, k), k_of(t, v), t[None, None], ROPE), None)
        k_of = lambda t, x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), t, 1, axis=2)
        return jax.lax.scan(step, ring, jnp.arange(tokens, dtype=jnp.int32))[0]

    ring = run(ring)
    held = [*range(sinks), *range(tokens - slots + sinks, tokens)]
    assert sorted(np.asarray(ring.pos)[0, 0].tolist()) == held
    rotated = np.asarray(rotate(jnp.asarray(k), jnp.arange(tokens), ROPE))
    order = np.argsort(np.asarray(ring.pos)[0, 0])
    np.testing.assert_allclose(np.asarray(_dense(ring).k)[0, 0][order], _rounded(rotated[0, 0], bits)[held], atol=1e-6)
    np.testing.assert_allclose(np.asarray(_dense(ring).v)[0, 0][order], _rounded(v[0, 0], bits)[held], atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_slot_of_an_evicted_token_is_used_again_in_packed_words(bits):
    """The token of the smallest key goes at every step; the next one takes its place, and its neighbours' bits stay."""
    slots, tokens = 16, 60
    k, v = np.random.default_rng(1).normal(size=(2, 1, 1, tokens, H)).astype(np.float32)
    codec = Affine.of_slots(bits, None, scale_dtype="float32")
    part = Segment.empty(1, 1, slots, H, jnp.float32).encoded(codec, codec)

    @quick_jit
    def run(part):
        def step(part, t):
            new = (jax.lax.dynamic_slice_in_dim(jnp.asarray(x), t, 1, axis=2) for x in (k, v))
            part = part.append(*new, t[None, None], None)
            size = jnp.where(part.pos >= 0, jnp.sum(part.dense().k ** 2, axis=-1), LAST)
            full = jnp.all(part.pos >= 0, axis=-1, keepdims=True)
            return part.drop(full & (jnp.arange(slots) == jnp.argmin(size, axis=-1)[..., None])), None

        return jax.lax.scan(step, part, jnp.arange(tokens, dtype=jnp.int32))[0]

    part = run(part)
    stored, held = _rounded(k[0, 0], bits), []
    for t in range(tokens):
        held.append(t)
        if len(held) == slots:
            held.remove(min(held, key=lambda i: np.sum(np.square(stored[i]))))
    pos = np.asarray(part.pos)[0, 0]
    assert sorted(pos[pos >= 0].tolist()) == held
    values = np.asarray(_dense(part).v)[0, 0]
    np.testing.assert_allclose(values[pos >= 0], _rounded(v[0, 0], bits)[pos[pos >= 0]], atol=1e-6)


# --- what the codes lose -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, expected", [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_levels_lose_what_the_best_quantizer_of_normal_numbers_does(bits, expected):
    """Relative squared error of random vectors of 128 channels, in a Hadamard basis with random signs."""
    x = jnp.float32(np.random.default_rng(0).standard_t(4, size=(1, 2, 512, 128)))  # heavy tails: rotation makes normal
    slots = Segment.of(x, x, jnp.broadcast_to(jnp.arange(512), (1, 2, 512)))
    codec = UnitNorm(Levels.gaussian(bits), None)
    basis = Hadamard(seed=0)
    part = LatentSegment.of(slots, basis, basis).map_dense(None, lambda c: c.encoded(codec, codec))
    error = np.asarray(_dense(part).k) - x
    relative = np.mean(np.sum(np.square(error), axis=-1) / np.sum(np.square(x), axis=-1))
    assert math.isclose(relative, expected, rel_tol=0.05)


def test_an_offset_of_a_channel_costs_no_precision_where_keys_are_centred():
    """A bfloat16 zero of 300 is good to one part in 256, which is several steps of what keys differ in."""
    slots, channels = 256, 64
    own = np.random.default_rng(3).normal(size=(1, 1, slots, channels))
    own[..., 7] *= 0.1

    def steps(offset, center):
        k = own + offset * np.eye(channels)[7]
        transform = kvjax.methods.kivi(8, residual=32, center=center)
        init = quick_jit(lambda cache, seen: transform.init(cache, seen)[0])
        cache = init(slots_cache(k, [slots]), seen_of([slots], prompt_slots=slots))
        dense = _dense(cache.layers[0].segments[-1])
        pos = np.asarray(dense.pos)[0, 0]
        error = np.asarray(dense.k)[0, 0][pos >= 0] - k[0, 0][pos[pos >= 0]]
        return np.sqrt(np.mean(np.square(error[:, 7])))

    assert steps(300.0, False) > 3 * steps(0.0, False)
    assert steps(300.0, True) < 1.1 * steps(0.0, False)


def test_keys_under_a_cap_of_logits_are_not_centred_and_the_log_says_so(caplog):
    seen = seen_of([20])
    capped = seen.replace(layers=tuple(layer.replace(scale=SoftCap(0.5, 50.0)) for layer in seen.layers))
    cache = slots_cache(np.random.default_rng(0).normal(size=(1, 2, 20, 4)), [20])
    assert jax.tree.structure(kvjax.center_keys().init(cache, capped)[0]) == jax.tree.structure(cache)
    assert "center_keys leaves keys as they are" in caplog.text


@pytest.mark.parametrize(
    "method",
    [
        lambda: kvjax.methods.turboquant(4),
        lambda: kvjax.methods.turboquant(3),
        lambda: kvjax.methods.kivi(4, residual=32),
        lambda: kvjax.methods.kivi(8, residual=32),
        lambda: kvjax.quantize(8, key_axis="token", residual=0),
    ],
    ids=["turboquant", "turboquant at 3 bits", "kivi4", "int8", "int8 slot by slot"],
)
def test_the_key_of_a_query_is_found_among_keys_with_outlier_channels(method):
    """Two of 64 channels at +-300 in every key before RoPE, as biases make them; queries are the keys' other part."""
    slots, channels = 256, 64
    rng = np.random.default_rng(2)
    own = rng.normal(size=(1, 1, slots, channels))
    offset = np.zeros(channels)
    offset[[30, 63]] = 300.0, -300.0  # channels that turn slowly
    rope, pos = Rope.from_base(10000.0, channels), jnp.arange(slots)
    turned = lambda x: rotate(jnp.float32(x), pos, rope)
    cache = slots_cache(np.asarray(turned(own + offset)), [slots])
    seen = seen_of([slots], prompt_slots=slots)
    cache, _ = quick_jit(lambda cache, seen: method().init(cache, seen))(cache, seen)
    dense = _dense(cache.layers[0].segments[-1])
    logits = np.einsum("th,sh->ts", np.asarray(turned(own))[0, 0], np.asarray(dense.k)[0, 0])
    best = np.asarray(dense.pos)[0, 0][np.argmax(np.where(np.asarray(dense.pos)[0, 0] >= 0, logits, -np.inf), axis=-1)]
    exact = np.argmax(np.asarray(turned(own))[0, 0] @ np.asarray(turned(own + offset))[0, 0].T, axis=-1)
    np.testing.assert_array_equal(best, exact)
