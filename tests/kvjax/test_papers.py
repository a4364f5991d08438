"""Every eviction method keeps what its paper's steps keep, call by call, and reads it as the paper does."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from tests.kvjax import papers, table_decoder
from tests.kvjax.conformance import positions
from tests.quick_jit import quick_jit

TABLES = table_decoder.tables()
STEP = table_decoder.decoder(TABLES)
T, LENGTHS, DECODED = 40, (40, 27), 14
BUDGET = 16

# float32 against float64 over at most 300 probabilities; outputs are of order one.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def _tokens(row: int, count: int) -> np.ndarray:
    """Tokens of one row, none twice."""
    return np.random.default_rng(100 + row).permutation(table_decoder.VOCAB)[:count]


def _prefill(transform, *, chunk=None, room=DECODED, call_tokens=1) -> kvjax.Run:
    prompt = jnp.int32(np.stack([_tokens(row, T) for row in range(2)]))

    def run(prompt, lengths, cache):
        return kvjax.prefill(
            STEP, transform, prompt, lengths, cache, room=room, call_tokens=call_tokens, chunk=chunk
        )

    return quick_jit(run)(prompt, jnp.array(LENGTHS), table_decoder.empty(2))


def _calls(length: int, chunk: int | None) -> list[int]:
    size = chunk or length
    return [min(size, length - start) for start in range(0, length, size)]


def _follow(transform, policy, *, chunk=None, reindex=False, decoded=DECODED) -> kvjax.Run:
    """Runs a method beside its paper's policy and compares them after the prefill and after every token."""
    traces, prompt_calls = [], []
    for row, length in enumerate(LENGTHS):
        calls = _calls(length, chunk)
        prompt_calls.append(len(calls))
        traces.append(
            table_decoder.simulate(
                TABLES,
                _tokens(row, length + decoded),
                calls + [1] * decoded,
                len(calls),
                functools.partial(policy, row),
                reindex,
            )
        )
    extend = quick_jit(
        lambda run, tokens: kvjax.extend(STEP, transform, run, tokens, jnp.ones(2, jnp.int32))[0]
    )
    run = _prefill(transform, chunk=chunk, room=decoded)
    for t in range(decoded + 1):
        if t:
            tokens = [_tokens(row, LENGTHS[row] + t)[-1:] for row in range(2)]
            run = extend(run, jnp.int32(np.stack(tokens)))
        for row in range(2):
            trace = traces[row][prompt_calls[row] - 1 + t]
            assert positions(run.cache, row) == trace.kept, (row, t)
            np.testing.assert_allclose(run.logits[row], trace.out, **CLOSE)
    return run


def test_the_full_cache_is_plain_attention():
    _follow(methods.full(), lambda row: papers.KeepAll())


@pytest.mark.parametrize("pooling, kernel", [("avg", 5), ("max", 3)])
def test_snapkv(pooling, kernel):
    method = methods.snapkv(BUDGET, window=6, kernel=kernel, pooling=pooling)
    _follow(method, lambda row: papers.SnapKV(BUDGET, 6, kernel, pooling), decoded=2)


def test_snapkv_with_a_fraction_keeps_it_of_each_row():
    method = methods.snapkv(0.4, window=6)
    budget = {row: int(0.4 * length + 1e-9) for row, length in enumerate(LENGTHS)}
    _follow(method, lambda row: papers.SnapKV(budget[row], 6, 5, "avg"), decoded=2)


def test_snapkvs_maximum_padded_with_minus_infinity_is_padded_with_zero():
    # torch pads max pooling with -inf; attention is never negative, so zeros choose the same.
    method = methods.snapkv(BUDGET, window=6, kernel=7, pooling="max")
    _follow(method, lambda row: papers.SnapKV(BUDGET, 6, 7, "max", pad=-np.inf), decoded=1)


def test_snapkv_leaves_a_short_prompt_alone():
    _follow(methods.snapkv(64, window=6), lambda row: papers.SnapKV(64, 6, 5, "avg"), decoded=2)


@pytest.mark.parametrize("normalise, chunk", [(False, None), (True, None), (True, 9)])
def test_h2o(normalise, chunk):
    method = methods.h2o(BUDGET, recent=0.5, normalise=normalise)
    _follow(method, lambda row: papers.H2O(BUDGET, BUDGET // 2, normalise), chunk=chunk)


def test_h2o_with_fractions_keeps_them_of_each_row():
    budget = {row: int(0.4 * length + 1e-9) for row, length in enumerate(LENGTHS)}
    _follow(methods.h2o(0.4, recent=0.25), lambda row: papers.H2O(budget[row], budget[row] // 4))


@pytest.mark.parametrize("chunk", [None, 9])
def test_h2o_scores_at_the_ranks_that_attention_reads_at(chunk):
    method = kvjax.chain(kvjax.reindex(), methods.h2o(BUDGET, recent=0.5))
    _follow(method, lambda row: papers.H2O(BUDGET, BUDGET // 2), chunk=chunk, reindex=True)


@pytest.mark.parametrize("chunk", [None, 9])
def test_tova(chunk):
    _follow(methods.tova(BUDGET), lambda row: papers.Tova(BUDGET), chunk=chunk)


def test_knorm():
    _follow(methods.knorm(BUDGET), lambda row: papers.Knorm(BUDGET), decoded=2)


def test_keydiff():
    _follow(methods.keydiff(BUDGET), lambda row: papers.KeyDiff(BUDGET), decoded=2)


def test_keydiff_block_by_block_drops_before_it_reads_on():
    policy = lambda row: papers.KeyDiffByBlock(BUDGET, prompt=LENGTHS[row])
    _follow(methods.keydiff(BUDGET, by_chunk=True), policy, chunk=9, decoded=2)


@pytest.mark.parametrize("reindex, chunk", [(True, None), (True, 9), (False, 9)])
def test_streamingllm(reindex, chunk):
    method = methods.streamingllm(BUDGET, sinks=3, reindex=reindex)
    _follow(method, lambda row: papers.StreamingLLM(3, BUDGET - 3), chunk=chunk, reindex=reindex)


def test_a_ring_leaves_re_indexed_slots_as_they_are():
    method = kvjax.chain(kvjax.reindex(), methods.streamingllm(BUDGET, sinks=3, reindex=False))
    _follow(method, lambda row: papers.StreamingLLM(3, BUDGET - 3), reindex=True)


def test_streamingllm_without_sinks_is_a_sliding_window():
    method = methods.streamingllm(BUDGET, sinks=0)
    _follow(method, lambda row: papers.StreamingLLM(0, BUDGET), reindex=True)


def test_streamingllm_runs_hundreds_of_tokens_beyond_its_capacity_in_constant_memory():
    method = methods.streamingllm(BUDGET, sinks=3)
    before = kvjax.nbytes(_prefill(method).cache)
    run = _follow(method, lambda row: papers.StreamingLLM(3, BUDGET - 3), reindex=True, decoded=300)
    assert kvjax.nbytes(run.cache) == before
    assert positions(run.cache, 0)[0][0] == [0, 1, 2, *range(327, 340)]


@pytest.mark.parametrize("reindex", [True, False])
def test_streamingllm_reads_a_question_of_several_tokens(reindex):
    method = methods.streamingllm(BUDGET, sinks=3, reindex=reindex)
    run = _prefill(method, call_tokens=5)
    question = jnp.int32(np.stack([_tokens(row, LENGTHS[row] + 5)[-5:] for row in range(2)]))
    run, logits = kvjax.extend(STEP, method, run, question, jnp.array([5, 3]))
    for row, asked in enumerate((5, 3)):
        length = LENGTHS[row]
        for first in range(1, asked + 1):  # the trace shows a call's last token: ask for every prefix
            trace = table_decoder.simulate(
                TABLES,
                _tokens(row, length + first),
                [length, first],
                1,
                lambda: papers.StreamingLLM(3, BUDGET - 3),
                reindex,
            )[-1]
            np.testing.assert_allclose(logits[row, first - 1], trace.out, **CLOSE)
        assert positions(run.cache, row) == trace.kept


def test_random_eviction_keeps_its_budget_of_each_row_whatever_the_batch():
    rows = [positions(_prefill(methods.random_eviction(BUDGET)).cache, row) for row in range(2)]
    assert len({tuple(head) for layer in rows[0] for head in layer}) == 4  # 2 layers, 2 heads
    for longer, shorter in zip(*rows):
        for a, b in zip(longer, shorter):
            assert len(a) == len(b) == BUDGET
            # Numbers belong to positions: what the longer row keeps of the first 27 tokens, the shorter one does.
            assert {p for p in a if p < LENGTHS[1]} <= set(b)


def test_random_eviction_draws_uniform_numbers():
    S = 4000
    segment = kvjax.Segment.empty(1, 2, S, 2, jnp.float32).with_slots(pos=jnp.tile(jnp.arange(S), (1, 2, 1)))
    queries = kvjax.Queries(jnp.zeros((1, 1, 2, 2)), jnp.zeros((1, 1), jnp.int32), kvjax.Rope.from_base(10.0, 2))
    draws = [
        np.asarray(kvjax.scores.random(seed).score(segment, kvjax.LayerObservation(queries, None, jnp.int32(layer))))
        for seed in (0, 1)
        for layer in (0, 1)
    ]
    draws = np.concatenate(draws, axis=1)[0]  # [8, S]: seeds, layers and heads
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    # 32000 draws in 20 bins: mean 1600, standard deviation 39; five of them are no accident.
    assert (np.abs(counts - 8 * S / 20) < 195).all()
    # Independent rows of 4000: the standard deviation of a correlation is 0.016.
    assert np.abs(np.corrcoef(draws) - np.eye(8)).max() < 0.08


@pytest.mark.parametrize("floor, normalise", [(0.2, False), (0.5, True), (0.0, False)])
def test_adakv(floor, normalise):
    method = methods.adakv_snapkv(BUDGET, window=6, kernel=3, floor=floor, normalise=normalise, page=4)
    run = _follow(method, lambda row: papers.AdaKV(BUDGET, 6, 3, floor, normalise), decoded=2)
    held = [len(head) for layer in positions(run.cache, 0) for head in layer]
    assert len(set(held)) > 1  # heads do keep different numbers


def test_pyramidkv():
    budgets = papers.pyramid_budgets(table_decoder.LAYERS, 12, 6, T, 4)
    assert budgets[0] > 12 > budgets[-1]

    def policy():
        layer = iter(budgets)
        return lambda: papers.SnapKV(next(layer), 6, 5, "avg")

    made = {row: policy() for row in range(2)}
    method = methods.pyramidkv(12, window=6, beta=4)
    _follow(method, lambda row: made[row](), decoded=2)


def test_pyramidkv_splits_evenly_where_the_prompt_is_short():
    assert papers.pyramid_budgets(4, 16, 6, 24, 4) == [16] * 4
    assert kvjax.pyramid(4)(4, 10, 18) == (10,) * 4


@pytest.mark.parametrize("layers, slots, prompt, beta", [(30, 96, 5000, 20), (32, 2016, 4064, 20), (5, 10, 20, 3)])
def test_pyramid_budgets_are_the_official_ones_without_their_excess(layers, slots, prompt, beta):
    """The official step from layer to layer is rounded down, so that the last layers keep more than they should."""
    official = np.array(papers.pyramid_budgets(layers, slots + 8, 8, prompt + 8, beta)) - 8
    ours = np.array(kvjax.pyramid(beta)(layers, slots, prompt))
    assert ours.sum() == layers * slots <= official.sum()
    assert ours[0] == official[0] and ours[-1] == 2 * slots - official[0]
    assert (np.abs(np.diff(ours, 2)) <= 2).all()  # a line, rounded
    over = (official - ours) / np.maximum(np.arange(layers), 1)
    assert (over >= -1).all() and (over <= 1).all()  # less than a token for each layer above


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_lazyeviction(alpha):
    method = methods.lazyeviction(BUDGET, window=5, alpha=alpha)
    _follow(method, lambda row: papers.LazyEviction(BUDGET, 5, alpha))


@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention(covariance):
    scorer = kvjax.scores.future_attention(future=20, sinks=4, covariance=covariance)
    tables = [np.asarray(x, np.float64) for x in TABLES]
    run = _prefill(kvjax.at_prefill_end(kvjax.evict(scorer, BUDGET, sinks=4)))
    for row, length in enumerate(LENGTHS):
        tokens = _tokens(row, length)
        for layer, heads in enumerate(positions(run.cache, row)):
            q, k, v = (x[layer, tokens] for x in tables)
            for head, held in enumerate(heads):
                mine = np.s_[head * table_decoder.GROUP : (head + 1) * table_decoder.GROUP]
                rotated = table_decoder.turn(k[:, head], np.arange(length))
                want = papers.expected_attention(q[:, mine], rotated, v[:, head], table_decoder.turn, 20, 4, covariance)
                expected = sorted([0, 1, 2, 3, *(4 + np.argsort(-want)[: BUDGET - 4])])
                assert held == expected


def _kept(transform, kept, **how) -> kvjax.Run:
    """Follows a method that keeps, of row, layer and head, what was decided elsewhere."""
    policies = [iter([papers.Fixed(layer) for layer in row]) for row in kept]
    return _follow(transform, lambda row: next(policies[row]), decoded=2, **how)


@pytest.mark.parametrize("chunk, taus", [(None, (1.0, 1.0)), (9, (1.6, 0.4))])
def test_cake(chunk, taus):
    kept = []
    for row, length in enumerate(LENGTHS):
        seen = []

        def look(probability, slots, keys, done):
            seen.append(probability)
            return slots

        table_decoder.simulate(TABLES, _tokens(row, length), [length], 1, lambda: look)
        preference, indicator = papers.cake(seen, 6, 5, 200.0, taus)
        held = papers.cake_cascade(preference, indicator, BUDGET - 6)
        newest = np.arange(length - 6, length)
        kept.append([[np.concatenate([head, newest]) for head in layer] for layer in held])
    method = methods.cake(BUDGET, window=6, tau_entropy=taus[0], tau_variance=taus[1], page=4)
    run = _kept(method, kept, chunk=chunk)
    assert len({len(head) for layer in positions(run.cache, 0) for head in layer}) == 2  # layers keep different numbers


@pytest.mark.parametrize("size, chunk", [(64, None), (16, None), (16, 9)])
def test_kvzip(size, chunk):
    instruction = kvjax.Instruction(first=(300, 301, 302), later=(310, 311), answer=(320,))
    sinks, overlap = 4, 3
    q, k, _ = (np.asarray(x, np.float64) for x in TABLES)
    kept = []
    for row, length in enumerate(LENGTHS):
        tokens = _tokens(row, length)
        scores = np.zeros((table_decoder.LAYERS, table_decoder.KV_HEADS, length))
        for start in range(0, length, size):
            again = papers.kvzip_input(tokens, start, size, overlap, instruction)
            at = length + np.arange(len(again))
            for layer, head in np.ndindex(scores.shape[:2]):
                mine = np.s_[head * table_decoder.GROUP : (head + 1) * table_decoder.GROUP]
                scores[layer, head, start : start + size] = papers.kvzip_scores(
                    table_decoder.turn(q[layer, again, mine].swapaxes(0, 1), at),
                    table_decoder.turn(k[layer, tokens, head], np.arange(length)),
                    table_decoder.turn(k[layer, again, head], at),
                    start,
                    size,
                    sinks,
                )
        kept.append(papers.kvzip_kept(scores, BUDGET, sinks))
    method = methods.kvzip(BUDGET, instruction, chunk=size, sinks=sinks, overlap=overlap, page=4)
    run = _kept(method, kept, chunk=chunk)
    held = [[len(head) for head in layer] for layer in positions(run.cache, 0)]
    assert len({n for layer in held for n in layer}) > 2 and sum(map(sum, held)) == 4 * (BUDGET + 2)


@pytest.mark.parametrize("chunk", [None, 9])
def test_attention_gate(chunk, monkeypatch):
    monkeypatch.setattr("kvjax.gating._BLOCK", 16)  # several blocks, the last one padded
    rng, L, K, H = np.random.default_rng(7), table_decoder.LAYERS, table_decoder.KV_HEADS, table_decoder.HEAD_DIM
    gates = {"qkv": (L, 2, K, H, 3, 2, 4), "out": (L, 2, 4, K), "bias": (L, K)}
    gates = {name: 0.5 * rng.normal(size=shape) for name, shape in gates.items()}
    kept = []
    for row, length in enumerate(LENGTHS):
        _, k, v = (np.asarray(x, np.float64)[:, _tokens(row, length)] for x in TABLES)
        p = [papers.attention_gate(*(gates[name][layer] for name in gates), k[layer], v[layer]) for layer in range(L)]
        kept.append([papers.gated_kept(x, BUDGET, 2, 5) for x in p])
    gates = {name: jnp.float32(x) for name, x in gates.items()}
    run = _kept(methods.attention_gate(gates, BUDGET, sinks=2, recent=5, page=4), kept, chunk=chunk)
    assert len({len(head) for layer in positions(run.cache, 0) for head in layer}) > 2  # heads differ


@pytest.mark.parametrize("chunk, then", [(None, []), (9, []), (None, [methods.streamingllm(64)])])
def test_reasoncache_of_a_texts_keys_and_values_is_that_text_read_before(chunk, then):
    """Also where positions are counted inside a cache that has room for everything."""
    m, demonstration = 5, 300 + np.arange(5)
    _, k, v = (np.asarray(x, np.float64)[:, demonstration].swapaxes(1, 2) for x in TABLES)  # [L, K, m, H]
    slots = {"key": jnp.float32(table_decoder.turn(k, np.arange(-m, 0))), "value": jnp.float32(v)}
    method = kvjax.chain(methods.reasoncache(slots), *then)
    run = _prefill(method, chunk=chunk, room=1)
    asked = [_tokens(row, length + 1)[-1:] for row, length in enumerate(LENGTHS)]
    after, _ = kvjax.extend(STEP, method, run, jnp.int32(np.stack(asked)), jnp.ones(2, jnp.int32))
    for row, length in enumerate(LENGTHS):
        tokens = np.concatenate([demonstration, _tokens(row, length + 1)])
        prompt, token = table_decoder.simulate(TABLES, tokens, [m + length, 1], 1, papers.KeepAll)
        np.testing.assert_allclose(run.logits[row], prompt.out, **CLOSE)
        np.testing.assert_allclose(after.logits[row], token.out, **CLOSE)
        assert positions(after.cache, row)[1][0] == [0] * m + list(range(length + 1))


def _head(row: int, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotated keys and values [T, H] of a prompt, in float64."""
    tokens = _tokens(row, LENGTHS[row])
    _, k, v = (np.asarray(x[layer, tokens], np.float64) for x in TABLES)
    return table_decoder.turn(k[:, head], np.arange(len(tokens))), v[:, head]


def _each_head(kept) -> list:
    """`kept(row, layer, head)` of every row, layer and head, for `_kept`."""
    heads = lambda row, layer: [kept(row, layer, head) for head in range(table_decoder.KV_HEADS)]
    return [[heads(row, layer) for layer in range(table_decoder.LAYERS)] for row in range(2)]


@pytest.mark.parametrize("lag, chunk", [(7, None), (7, 9), (16, None)])
def test_lagkv(lag, chunk):
    kept = _each_head(lambda *head: papers.lagkv(*_head(*head), budget=22, lag=lag, sinks=3))
    _kept(methods.lagkv(22, lag=lag, sinks=3), kept, chunk=chunk)


@pytest.mark.parametrize("mix, threshold", [(0.1, 0.5), (0.9, 0.2)])
def test_rkv(mix, threshold):
    method = methods.rkv(BUDGET, window=5, kernel=3, mix=mix, threshold=threshold, interval=30)
    _follow(method, lambda row: papers.RKV(BUDGET, 5, 3, mix, threshold, interval=30), decoded=4)


def test_rkv_judges_generated_tokens_every_interval():
    # With mix = 0 only keys count: the policy sees the queries of one step alone.
    method = methods.rkv(BUDGET, window=3, kernel=3, mix=0.0, interval=5)
    _follow(method, lambda row: papers.RKV(BUDGET, 3, 3, 0.0, 0.5, interval=5))


def _attention(row: int) -> list[list[np.ndarray]]:
    """What the queries of a prompt give each token: per layer and KV head [G, T, T], in float64."""
    seen = []

    def look(probability, slots, keys, done):
        seen.append(probability)
        return slots

    table_decoder.simulate(TABLES, _tokens(row, LENGTHS[row]), [LENGTHS[row]], 1, lambda: look)
    return seen


@pytest.mark.parametrize("reuse, chunk", [(1, None), (2, 9)])
def test_chunkkv(reuse, chunk):
    kept = []
    for row in range(2):
        layers = [papers.chunkkv(layer, 21, 4, 6) for layer in _attention(row)]
        kept.append([[layers[i // reuse * reuse]] * table_decoder.KV_HEADS for i in range(len(layers))])
    assert not np.array_equal(*layers)  # layers would choose differently
    _kept(methods.chunkkv(21, chunk=4, window=6, reuse=reuse), kept, chunk=chunk)


@pytest.mark.parametrize("first, chunk", [(0.5, None), (0.0, 9)])
def test_criticalkv(first, chunk):
    L, K, G, H = table_decoder.LAYERS, table_decoder.KV_HEADS, table_decoder.GROUP, table_decoder.HEAD_DIM
    output = np.random.default_rng(3).normal(size=(L, K * G, H, 10))
    attention = [_attention(row) for row in range(2)]

    def kept(row, layer, head):
        mine = output[layer, head * G : (head + 1) * G]
        return papers.criticalkv(attention[row][layer][head], _head(row, layer, head)[1], mine, 21, 6, 5, first)

    method = methods.criticalkv({"output": jnp.float32(output)}, 21, window=6, first=first)
    _kept(method, _each_head(kept), chunk=chunk)


def test_keyformer_without_noise_is_h2o():
    method = methods.keyformer(BUDGET, recent=0.5, growth=0.0, noise=0.0)
    _follow(method, lambda row: papers.H2O(BUDGET, BUDGET // 2), chunk=9, decoded=4)


@pytest.mark.parametrize("chunk", [None, 9])
def test_keyformer(chunk):
    layers = {row: iter(range(table_decoder.LAYERS)) for row in range(2)}
    heads = table_decoder.QUERY_HEADS

    def policy(row):
        return papers.Keyformer(BUDGET, BUDGET // 2, 1.5, 0.1, 7, heads * next(layers[row]), LENGTHS[row])

    method = methods.keyformer(BUDGET, recent=0.5, temperature=1.5, growth=0.1, seed=7)
    _follow(method, policy, chunk=chunk, decoded=6)


@pytest.mark.parametrize("chunk, calls", [(8, None), (8, 16), (64, None)])
def test_compactor(chunk, calls):
    """Read in calls that begin where chunks do, or all at once."""
    sinks, recent, G = 3, 2, table_decoder.GROUP
    scores = np.full((2, table_decoder.LAYERS, table_decoder.KV_HEADS, T), np.nan)
    for row, layer in np.ndindex(scores.shape[:2]):
        length = LENGTHS[row]
        at = np.arange(sinks, length)
        q, k, v = (np.asarray(x[layer, _tokens(row, length)[sinks:]], np.float64) for x in TABLES)
        sketch = np.asarray(kvjax.scores_of_keys.random_sketch(5, jnp.int32(layer), 2, table_decoder.HEAD_DIM, 4))
        parts = [[], []]
        for head in range(table_decoder.KV_HEADS):
            rotated = table_decoder.turn(q[:, head * G : (head + 1) * G].swapaxes(0, 1), at)
            parts[0].append(papers.leverage(k[:, head], np.float64(sketch[head])))
            parts[1].append(papers.noncausal(rotated, table_decoder.turn(k[:, head], at), v[:, head], at // chunk))
        one, other = ((x - np.mean(x)) / np.std(x, ddof=1) for x in parts)
        scores[row, layer, :, sinks:length] = 0.3 * one + other

    def kept(row, layer, head):
        length = LENGTHS[row]
        free = np.arange(sinks, length - recent)
        best = free[np.argsort(-scores[row, layer, head, free])[: BUDGET - sinks - recent]]
        return np.array(sorted([*range(sinks), *best, *range(length - recent, length)]))

    method = methods.compactor(BUDGET, 0.3, sketch=4, chunk=chunk, sinks=sinks, recent=recent, seed=5)
    _kept(method, _each_head(kept), chunk=calls)


def test_prefixkv():
    coverage = np.linspace(0, 1, 33) ** np.array([[0.5], [0.2]])
    counts = {}
    for row, length in enumerate(LENGTHS):
        first = papers.prefixkv_budgets(coverage, (BUDGET - 2) / (length - 2), length - 2)[0]
        counts[row] = [int(first) + 2, 2 * BUDGET - int(first) - 2]
        assert counts[row][0] > counts[row][1]
    layers = {row: iter(counts[row]) for row in counts}
    method = methods.prefixkv({"coverage": jnp.float32(coverage)}, BUDGET)
    _follow(method, lambda row: papers.PrefixKV(next(layers[row])), decoded=2)


@pytest.mark.parametrize("strategy, suffix, group", [("max", 4, 1), ("average", 6, 1), ("max", 6, 2)])
def test_windowkv(strategy, suffix, group):
    kept = []
    for row in range(2):
        layers, counts = _attention(row), papers.windowkv_budgets(table_decoder.LAYERS, 14 - suffix, group, 1.5)
        of = lambda i: papers.windowkv(layers[i // group * group], counts[i], suffix, 4, strategy)
        kept.append([[of(i)] * table_decoder.KV_HEADS for i in range(len(layers))])
    assert group == 2 or counts[0] > counts[1]
    method = methods.windowkv(14, strategy, suffix=suffix, window=4, group=group, beta=1.5)
    _kept(method, kept)


@pytest.mark.parametrize("share, anchor", [(0.3, "alternate"), (0.5, "ones"), (1.0, "mean")])
def test_kvcrush(share, anchor):
    kept = []
    for row in range(2):
        layers = [papers.kvcrush(layer, 19, 6, 5, 2, share, anchor) for layer in _attention(row)]
        kept.append([[layer] * table_decoder.KV_HEADS for layer in layers])
    _kept(methods.kvcrush(19, share, anchor, window=6, sinks=2), kept)


@pytest.mark.parametrize("chunk", [None, 9])
def test_critic(chunk):
    method = methods.critic(BUDGET, attention=0.7, entropy=0.3, recent=4)
    _follow(method, lambda row: papers.CRITIC(BUDGET, 4, (0.7, 0.3)), chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 9])
def test_alisa(chunk):
    layers = {row: iter(range(table_decoder.LAYERS)) for row in range(2)}

    def policy(row):
        q = np.asarray(TABLES.q[next(layers[row]), _tokens(row, LENGTHS[row] + DECODED)], np.float64)
        rotated = table_decoder.turn(q, np.arange(len(q))[:, None])
        return papers.ALISA(BUDGET, BUDGET // 2, 5, rotated)

    _follow(methods.alisa(BUDGET, window=5, bits=None), policy, chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 9])
def test_headkv(chunk):
    retrieval = np.array([[0.4, 0.1], [0.2, 0.3]])
    counts = papers.headkv_counts(retrieval, BUDGET - 6, 1.25)  # 14.8, 5.2, 8.4, 11.6: 38 of 40, the first two get one
    counts = np.floor(counts).astype(int) + [[1, 1], [0, 0]]
    attention = [_attention(row) for row in range(2)]

    def kept(row, layer, head):
        snap = papers.SnapKV(counts[layer, head] + 6, 6, 3, "max")
        length = LENGTHS[row]
        return snap([attention[row][layer][head]], [np.arange(length)], [None], True)[0]

    method = methods.headkv({"retrieval": jnp.float32(retrieval)}, BUDGET, 1.25, window=6, kernel=3, page=4)
    run = _kept(method, _each_head(kept), chunk=chunk)
    assert sum(len(head) for layer in positions(run.cache, 0) for head in layer) == 4 * (BUDGET + 2)  # two decoded


@pytest.mark.parametrize("last", [7, 0.2])
def test_mpcache_static(last):
    count = {row: last if last == 7 else -(-length // 5) for row, length in enumerate(LENGTHS)}
    method = methods.mpcache_static(BUDGET, last)
    _follow(method, lambda row: papers.MPCacheStatic(BUDGET, count[row]), decoded=2)
