"""RazorAttention against NumPy: which heads keep everything, and what the compensation token says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CompensatedSegment, HeadsSegment, Segment, methods
from kvjax.transforms.ring import as_ring
from tests.kvjax import table_decoder
from tests.quick_jit import quick_jit

TABLES = table_decoder.tables()
STEP = table_decoder.decoder(TABLES)
T, LENGTHS = 40, (40, 23)
SINKS, RECENT = 2, 6
CALLS = (5, 1, 1, 9, 1, 1, 1)  # tokens of the calls that follow; the fourth brings more than the window holds
SCORES = {"induction": jnp.array([[0.1, 0.9], [0.2, 0.3]]), "echo": jnp.array([[0.5, 0.6], [0.7, 0.1]])}
FULL = {(0, 1), (1, 0)}  # the first by induction, the second by echo
# float32 against float64 over at most 60 probabilities; outputs are of order one.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def _razor(q, keys, values, sinks, dropped):
    """Equation of the sheet: `(sum_j e^s_j v_j + N e^s v) / (sum_j e^s_j + N e^s)`, for the queries of one head.

    Args:
      q: [G, H], of the newest token, rotated.
      keys, values: [n, H], rotated, of all tokens so far.
      dropped: how many tokens after the sinks are represented by their mean; the rest is held.
    """
    seen = np.r_[0:sinks, sinks + dropped : len(keys)] if dropped else np.arange(len(keys))
    weight = np.exp(q @ keys[seen].T / np.sqrt(q.shape[-1]))
    total, out = weight.sum(axis=-1), weight @ values[seen]
    if dropped:
        gone = np.s_[sinks : sinks + dropped]
        mean = dropped * np.exp(q @ keys[gone].mean(axis=0) / np.sqrt(q.shape[-1]))
        total, out = total + mean, out + mean[:, None] * values[gone].mean(axis=0)
    return out / total[:, None]


def _expected(tokens, before, window):
    """[L * N * H]: attention of the last token; the ring held the newest `window` of the first `before` tokens."""
    q, k, v = (np.asarray(x, np.float64)[:, tokens] for x in TABLES)
    n, outs = len(tokens), []
    for layer in range(table_decoder.LAYERS):
        for head in range(table_decoder.KV_HEADS):
            mine = np.s_[head * table_decoder.GROUP : (head + 1) * table_decoder.GROUP]
            keys = table_decoder.turn(k[layer, :, head], np.arange(n))
            query = table_decoder.turn(q[layer, -1, mine], n - 1)
            dropped = 0 if (layer, head) in FULL else max(before - SINKS - window, 0)
            outs.append(_razor(query, keys, v[layer, :, head], SINKS, dropped).ravel())
    return np.concatenate(outs)


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_the_others_read_sinks_a_window_and_the_mean_of_the_rest(fraction):
    windows = [max(RECENT, int(fraction * n)) for n in LENGTHS]
    method = methods.razorattention(SCORES, 0.25, 0.25, sinks=SINKS, recent=RECENT, fraction=fraction)
    total = T + sum(CALLS)
    text = np.stack([np.random.default_rng(row).permutation(table_decoder.VOCAB)[:total] for row in range(2)])

    def read(prompt, lengths, cache):
        return kvjax.prefill(STEP, method, prompt, lengths, cache, room=sum(CALLS), call_tokens=max(CALLS))

    run = quick_jit(read)(jnp.int32(text[:, :T]), jnp.array(LENGTHS), table_decoder.empty(2))
    extend = quick_jit(
        lambda run, tokens, lengths: kvjax.extend(STEP, method, run, tokens, lengths)[0]
    )
    held = np.array(LENGTHS)
    for call in CALLS:
        # The second row brings one token less where there are several: padding is neither kept nor averaged.
        count = np.array([call, max(call - 1, 1)])
        new = np.stack([np.resize(text[row, held[row] : held[row] + count[row]], call) for row in range(2)])
        run = extend(run, jnp.int32(new), jnp.int32(count))
        for row in range(2):
            want = _expected(text[row, : held[row] + count[row]], held[row], windows[row])
            np.testing.assert_allclose(run.logits[row], want, **CLOSE)
        held += count


def _slots(S, dtype="float32", seed=0):
    k, v = np.random.default_rng(seed).normal(size=(2, 1, 2, S, 8)) + 1.0
    pos = jnp.tile(jnp.arange(S), (1, 2, 1))
    return Segment.of(jnp.asarray(k, dtype), jnp.asarray(v, dtype), pos)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_stays_right_over_thousands_of_tokens(dtype):
    S, more = 20, 3000
    segment = CompensatedSegment.of(_slots(S, dtype), as_ring(_slots(S, dtype), 8, 2))
    rope = kvjax.Rope(jnp.zeros(4))  # no rotation
    k, v = np.random.default_rng(1).normal(size=(2, 1, 2, more, 8)) + 1.0
    k, v = (jnp.asarray(x, dtype) for x in (k, v))

    def one(segment, t):
        at = lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, axis=2)
        return segment.append(at(k), at(v), jnp.full((1, 1), S) + t, rope), None

    segment, _ = jax.jit(lambda segment: jax.lax.scan(one, segment, jnp.arange(more)))(segment)
    dropped = S + more - 8
    np.testing.assert_allclose(np.exp(segment.mean.bias), dropped, rtol=1e-3)
    everything = jnp.concatenate([_slots(S, dtype).k, k], axis=2)
    expected = np.asarray(everything, np.float64)[:, :, 2 : 2 + dropped].mean(axis=2)
    np.testing.assert_allclose(segment.mean.k[:, :, 0], expected, rtol=1e-3)
    assert segment.mean.pos.ravel().tolist() == [1 + dropped] * 2
    assert segment.ring.k.dtype == dtype and segment.mean.k.dtype == jnp.float32


def test_dense_and_mass_agree_with_attention():
    ringed = lambda part, index: part if index == 0 else CompensatedSegment.of(part, as_ring(part, 8, 2))
    parts = quick_jit(lambda slots: HeadsSegment.of(slots, ((1,), (0,)), ringed))(_slots(20))
    raw = jnp.float32(np.random.default_rng(2).normal(size=(1, 3, 4, 8)))
    queries = kvjax.Queries(raw, jnp.array([[20, 21, -1]]), kvjax.Rope(jnp.zeros(4)))
    read, dense = quick_jit(lambda parts: (parts.attend(queries), parts.dense().attend(queries)))(parts)
    np.testing.assert_allclose(read.out, dense.out, atol=1e-5)
    np.testing.assert_allclose(read.lse, dense.lse, atol=1e-5)
    # Two queries see something; each gives all its attention.
    mass = quick_jit(lambda parts, lse: parts.mass(queries, lse))(parts, read.lse)
    np.testing.assert_allclose(mass.sum(axis=-1), 2.0, rtol=1e-5)
    assert kvjax.nbytes(parts.parts[1]) == 8 * (2 * 8 * 4 + 4) + 2 * 8 * 4 + 8


@pytest.mark.float8
def test_heads_may_be_quantized_in_blocks_and_compensated_rings_slot_by_slot():
    method = kvjax.chain(
        methods.fp8(),
        methods.razorattention(SCORES, 0.25, 0.25, sinks=SINKS, recent=RECENT),
        kvjax.quantize(8, key_group=4, value_group=8, residual=4),
    )

    def program(prompt, cache):
        run = kvjax.prefill(STEP, method, prompt, jnp.array(LENGTHS), cache, room=4, call_tokens=3)
        run = kvjax.extend(STEP, method, run, prompt[:, :3], jnp.array([3, 2]))[0]
        return kvjax.extend(STEP, method, run, prompt[:, :1], jnp.ones(2, jnp.int32))[0]

    prompt = jnp.int32(table_decoder.distinct_tokens(2, T))
    run = quick_jit(program)(prompt, table_decoder.empty(2))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((run.logits, run.cache)))
    full, others = run.cache.layers[0].segments[0].parts
    assert isinstance(full, kvjax.BlockedSegment) and isinstance(others, CompensatedSegment)
    assert others.ring.k.bits == 8 and others.ring.by_slot and others.mean.k.dtype == jnp.float32


def test_a_mean_of_unrotated_keys_is_refused():
    slots = _slots(20).replace(key_rope="at_attend")
    with pytest.raises(TypeError, match="needs rotated keys, got key_rope='at_attend'"):
        CompensatedSegment.of(slots, as_ring(slots, 8, 2))
