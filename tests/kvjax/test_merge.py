"""Merging methods hold what their papers' steps make, call by call, and slots stand for the tokens they took up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import BlockedSegment, LatentSegment, Queries, Segment, methods
from kvjax.calibration import attention_variance
from kvjax.segments.bases import Matrix
from kvjax.transforms.merge import Moves, move
from tests.kvjax import papers, table_decoder
from tests.kvjax.encoders import affine
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

TABLES = table_decoder.tables()
STEP = table_decoder.decoder(TABLES)
T, LENGTHS, DECODED, BUDGET = 40, (40, 27), 8, 16
H = table_decoder.HEAD_DIM
CLOSE = dict(rtol=5e-5, atol=5e-5)  # float32 against float64, up to thirty merges into one slot


def _tokens(row: int, count: int) -> np.ndarray:
    return np.random.default_rng(100 + row).permutation(table_decoder.VOCAB)[:count]


def _simulate(row: int, calls: list[int], policy) -> list[tuple[list[list[papers.Slots]], np.ndarray]]:
    """What each layer and head holds after every call, and the outputs of the call's last token, in float64."""
    q, k, v = (np.asarray(x, np.float64)[:, _tokens(row, sum(calls))] for x in TABLES)
    G = table_decoder.GROUP
    held = [
        [papers.Slots(np.zeros(0, int), np.zeros((0, H)), np.zeros((0, H)))] * table_decoder.KV_HEADS
        for _ in range(table_decoder.LAYERS)
    ]
    policies, trace, start = [policy(layer) for layer in range(table_decoder.LAYERS)], [], 0
    for size in calls:
        new, outs = np.arange(start, start + size), []
        start += size
        for layer, heads in enumerate(held):
            grown, probability = [], []
            for index, head in enumerate(heads):
                fresh = (new, table_decoder.turn(k[layer, new, index], new), v[layer, new, index])
                head = papers.Slots(*map(np.concatenate, zip(head, fresh)))
                queries = table_decoder.turn(q[layer, new, index * G : (index + 1) * G].swapaxes(0, 1), new)
                logits = np.where(head.pos <= new[:, None], queries @ head.k.T / np.sqrt(H), -np.inf)
                weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
                weights /= weights.sum(axis=-1, keepdims=True)
                outs.append((weights[:, -1] @ head.v).ravel())
                grown.append(head)
                probability.append(weights)
            held[layer] = policies[layer](probability, grown)
        trace.append(([list(heads) for heads in held], np.concatenate(outs)))
    return trace


def _assert_holds(cache, row, layers):
    for layer, heads in zip(cache.layers, layers, strict=True):
        segment = layer.segments[-1]
        for index, want in enumerate(heads):
            pos = np.asarray(segment.pos[row, index])
            at = [s for s in np.argsort(pos) if pos[s] >= 0]
            assert pos[at].tolist() == want.pos.tolist()
            np.testing.assert_allclose(segment.k[row, index][np.array(at)], want.k, **CLOSE)
            np.testing.assert_allclose(segment.v[row, index][np.array(at)], want.v, **CLOSE)


def _follow(transform, policy, *, chunk=None):
    """Runs a method beside its paper and compares what they hold after the prompt and after every token."""
    sizes = {row: [min(chunk or T, n - at) for at in range(0, n, chunk or T)] for row, n in enumerate(LENGTHS)}
    traces = {row: _simulate(row, sizes[row] + [1] * DECODED, functools.partial(policy, row)) for row in sizes}
    prompt = jnp.int32(np.stack([_tokens(row, T) for row in range(2)]))
    read = lambda cache: kvjax.prefill(
        STEP, transform, prompt, jnp.array(LENGTHS), cache, room=DECODED, chunk=chunk
    )
    run = quick_jit(read)(table_decoder.empty(2))
    extend = quick_jit(
        lambda run, tokens: kvjax.extend(STEP, transform, run, tokens, jnp.ones(2, jnp.int32))[0]
    )
    for t in range(DECODED + 1):
        if t:
            run = extend(run, jnp.int32(np.stack([_tokens(row, LENGTHS[row] + t)[-1:] for row in range(2)])))
        for row in range(2):
            layers, out = traces[row][len(sizes[row]) - 1 + t]
            _assert_holds(run.cache, row, layers)
            np.testing.assert_allclose(run.logits[row], out, **CLOSE)
    return run


@pytest.mark.parametrize("smoothing, whole", [(0.5, ()), (0.2, (-1,))])
def test_d2o(smoothing, whole):
    def policy(row, layer):
        budget = LENGTHS[row] if layer == 1 and whole else BUDGET
        return papers.D2O(budget, budget // 2, 4, smoothing)

    run = _follow(methods.d2o(BUDGET, smoothing=smoothing, whole=whole), policy)
    assert [layer.segments[0].pos.shape[2] for layer in run.cache.layers] == [BUDGET + 1, (T if whole else BUDGET) + 1]


def test_d2o_merges_some_tokens_and_drops_others():
    transform = methods.d2o(BUDGET, whole=(), log_count=True)
    prompt = jnp.int32(_tokens(0, T))[None]
    run = quick_jit(lambda cache: kvjax.prefill(STEP, transform, prompt, jnp.array([T]), cache, room=2))(
        table_decoder.empty(1)
    )
    for layer in run.cache.layers:
        stands_for = np.exp(np.where(layer.segments[0].pos >= 0, layer.segments[0].bias, -np.inf)).sum(axis=-1)
        assert ((BUDGET < stands_for) & (stands_for < T)).all()


@pytest.mark.parametrize("threshold", [-1.0, 0.4])
def test_kvmerger(threshold):
    method = methods.kvmerger(BUDGET, recent=5, heavy=0.25, threshold=threshold, width=2.0, whole=())
    _follow(method, lambda row, layer: papers.KVMerger(BUDGET, 5, BUDGET // 4, threshold, 2.0))


def test_elasticcache():
    method = methods.elasticcache(BUDGET)
    _follow(method, lambda row, layer: papers.MergedPrompt(BUDGET, 1, 1, "position"))


@pytest.mark.parametrize("weigh", ["mean", "pivot", "similarity"])
def test_lookm(weigh):
    method = methods.lookm(BUDGET, recent=5, weigh=weigh, sinks=2)
    _follow(method, lambda row, layer: papers.MergedPrompt(BUDGET, 5, 2, weigh))


@pytest.mark.parametrize("least", [-1.0, 0.2])
def test_ems(least):
    _follow(methods.ems(BUDGET, window=5, least=least), lambda row, layer: papers.EMS(BUDGET, 5, least))


@pytest.mark.parametrize("recent, following, chunk", [(12, 3, None), (4, 5, 9)])
def test_cam(recent, following, chunk):
    method = methods.cam(BUDGET, sinks=4, recent=recent, following=following)
    _follow(method, lambda row, layer: papers.CaM(BUDGET, recent, 4, following), chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 9])
def test_lococo(chunk):
    rng, L = np.random.default_rng(5), table_decoder.LAYERS
    kernel, bias, mix = 0.3 * rng.normal(size=(L, 5, 2 * H, 6)), rng.normal(size=(L, 6)), np.array([0.3, 0.8])
    trained = {name: jnp.float32(x) for name, x in dict(kernel=kernel, bias=bias, mix=mix).items()}

    def policy(row, layer):
        of_layer = (x[layer] for x in (kernel, bias, mix))
        return papers.LoCoCo(BUDGET, 4, *of_layer, table_decoder.turn, LENGTHS[row])

    _follow(methods.lococo(trained, BUDGET, recent=4), policy, chunk=chunk)


def test_whole_layers_keep_all_of_every_row():
    split = kvjax.whole_layers((0, -1), kvjax.by_variance([0.0, 1.0, 0.0, 0.5]))
    share = np.exp(-np.array([0.0, 1.0, 0.0, 0.5]))
    want = (share / share.sum() * 4 * 20).astype(int)
    assert split(4, 20, 100) == (100, want[1], want[2], 100)
    assert kvjax.by_variance([0.0, 1.0])(2, 30, 30) == (30, 30)
    assert kvjax.by_variance([0.0, 50.0])(2, 60, 100) == (100, 1)  # no more than there is, and 1% at least


def test_the_variance_of_attention_is_scaled_over_heads_and_averaged():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    pos = jnp.arange(12, dtype=jnp.int32)
    segment = Segment.of(2 * normal(1, 2, 12, H), normal(1, 2, 12, H), jnp.tile(pos, (1, 2, 1)))
    queries = Queries(normal(1, 12, 4, H), pos[None], kvjax.Rope.from_base(100.0, H))
    want = attention(queries.rotated, segment.k, segment.v, queries.pos, segment.pos)
    received = want.probability.sum(axis=1)[0]  # [N, S]
    variance = received.var(axis=-1)
    scaled = (variance - variance.min()) / (variance.max() - variance.min())
    seen = kvjax.LayerObservation(queries, jnp.float32(want.lse), jnp.int32(0))
    np.testing.assert_allclose(quick_jit(attention_variance)(segment, seen), scaled.mean(), rtol=1e-4)


# --- slots that stand for several tokens --------------------------------------------------------------------------


def _slots(S: int, seed: int = 0) -> Segment:
    k, v = np.random.default_rng(seed).normal(size=(2, 1, 2, S, H))
    return Segment.of(jnp.float32(k), jnp.float32(v), jnp.tile(jnp.arange(S, dtype=jnp.int32), (1, 2, 1)))


def _queries(pos: int, seed: int = 1) -> Queries:
    raw = np.random.default_rng(seed).normal(size=(1, 1, 4, H))
    return Queries(jnp.float32(raw), jnp.full((1, 1), pos, jnp.int32), kvjax.Rope.from_base(100.0, H))


@pytest.mark.parametrize("given", [[5], [5, 2, 6]])
def test_equal_tokens_merged_with_their_count_are_read_as_before(given):
    segment = _slots(8)
    same = lambda x: x.at[:, :, jnp.array([*given, 1])].set(x[:, :, :1])
    segment = segment.replace(k=same(segment.k), v=same(segment.v)).with_slots(bias=jnp.zeros((1, 2, 8)))
    queries = _queries(9)
    attend = quick_jit(lambda segment: segment.attend(queries))
    before = attend(segment)
    E = len(given)
    slots = jnp.broadcast_to(jnp.array(given), (1, 2, E))
    moves = Moves(slots, jnp.ones((1, 2, E), bool), jnp.full((1, 2, E), 1), jnp.full((1, 2, E), 0.3))
    after = quick_jit(move)(segment, moves)
    assert after.pos[0, 0].tolist() == [-1 if s in given else s for s in range(8)]
    assert np.isclose(float(after.bias[0, 1, 1]), np.log(1 + E))
    for a, b in zip(attend(after), before):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_goes_nowhere_is_dropped_and_what_is_not_real_stays():
    segment = _slots(4)
    real, nowhere = jnp.array([[[True, False]] * 2]), jnp.full((1, 2, 2), 4)
    moves = Moves(jnp.array([[[0, 3], [1, 2]]]), real, nowhere, jnp.ones((1, 2, 2)))
    after = quick_jit(move)(segment, moves)
    assert after.pos[0].tolist() == [[-1, 1, 2, 3], [0, -1, 2, 3]]
    np.testing.assert_array_equal(after.k, segment.k)


def test_packed_and_projected_slots_keep_the_log_of_their_count():
    bias = jnp.log(jnp.float32(np.random.default_rng(2).integers(1, 6, size=(1, 2, 24))))
    segment, queries = _slots(24).with_slots(bias=bias), _queries(30)
    encode = functools.partial(affine, bits=8, key_group=8, value_group=8)
    packed = quick_jit(lambda segment: BlockedSegment.from_dense(segment.take(*_all(segment, 21)), encode, 8))(segment)
    turn = lambda seed: Matrix(jnp.float32(np.linalg.qr(np.random.default_rng(seed).normal(size=(1, 2, H, H)))[0]))
    project = quick_jit(lambda segment: LatentSegment.of(segment, turn(3), turn(4)))
    latent = project(segment)
    late = project(kvjax.segments.segment.unrotated(segment, queries.rope))

    @quick_jit
    def read(segment):
        got = segment.attend(queries)
        return got, segment.mass(queries, got.lse), segment.dense()

    for other in (packed, latent, late):
        got, mass, dense = read(other)
        if other is not late:
            want = attention(queries.rotated, dense.k, dense.v, queries.pos, dense.pos, bias=dense.bias)
        else:
            want = attention(queries.rotated, segment.k, segment.v, queries.pos, segment.pos, bias=bias)
        np.testing.assert_allclose(got.out, want.out, **CLOSE)
        np.testing.assert_allclose(got.lse, want.lse, **CLOSE)
        np.testing.assert_allclose(mass, want.probability.sum(axis=1), **CLOSE)
    # A token that comes later stands for itself, also after it was packed.
    append = quick_jit(lambda segment, new, pos: segment.append(new, new, pos, queries.rope))
    grown = packed.reserve(8)
    for pos in range(24, 30):
        grown = append(grown, jnp.ones((1, 2, 1, H)), jnp.full((1, 1), pos, jnp.int32))
    body = grown.body
    assert int(jnp.sum(body.pos >= 0)) == 2 * 24
    held = np.asarray(body.pos[0, 0])
    assert not np.asarray(body.bias[0, 0])[held >= 24].any()
    np.testing.assert_array_equal(np.asarray(body.bias[0, 0])[(held >= 0) & (held < 21)], bias[0, 0, :21])


def _all(segment, count):
    index = jnp.broadcast_to(jnp.arange(count), (*segment.pos.shape[:2], count))
    return index, jnp.ones(index.shape, bool)


def test_evict_then_merge_then_quantize_holds_the_smallest_budget():
    chained = kvjax.chain(
        methods.snapkv(24, window=4, kernel=3),
        kvjax.at_prefill_end(methods.d2o(12, sinks=1, whole=())),
        kvjax.quantize(8, key_group=4, value_group=4, residual=4),
    )
    prompt = jnp.int32(_tokens(0, T))[None]
    run = jax.eval_shape(
        lambda cache: kvjax.prefill(STEP, chained, prompt, jnp.array([T]), cache, room=4), table_decoder.empty(1)
    )
    segment = run.cache.layers[0].segments[0]
    assert segment.body.pos.shape[2] == 12 + 4 and segment.tail.pos.shape[2] == 4


def test_a_few_moves_are_written_one_by_one_and_do_what_many_do():
    """Two of five go to the same slot, one nowhere, one is not real; nine, four of them not real, are one scatter."""
    rng = np.random.default_rng(0)
    B, K, S, H = 1, 2, 4096, 16
    k, v = jnp.float32(rng.normal(size=(2, B, K, S, H)))
    bias = jnp.float32(rng.normal(size=(B, K, S)))
    segment = Segment.of(k, v, jnp.broadcast_to(jnp.arange(S), (B, K, S)), bias=bias)

    def moves(count):
        wide = lambda x, fill: jnp.broadcast_to(jnp.array([*x, *[fill] * (count - 5)]), (B, K, count))
        weight = jnp.float32(wide([0.5, 0.25, 1.0, 0.75, 0.3], 0.0))
        return Moves(wide([3, 70, 9, 4000, 11], 0), wide([1, 1, 1, 1, 0], 0) == 1, wide([5, 5, S, 20, 5], S), weight)

    few, many = (jax.jit(move)(segment, moves(count)) for count in (5, 9))
    assert few.pos[0, 0, 3] == few.pos[0, 0, 9] == -1 and few.pos[0, 0, 11] == 11
    expected = (k[0, 0, 5] + 0.5 * k[0, 0, 3] + 0.25 * k[0, 0, 70]) / 1.75
    np.testing.assert_allclose(few.k[0, 0, 5], expected, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), few, many)
