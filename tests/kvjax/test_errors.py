"""Everything kvjax refuses, it refuses with a sentence that names the argument and says what came."""

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import chain, every, every_chunk, every_step, evict, methods, quantize, ring, scores, when_full
from kvjax.segments.buffered import BufferedSegment
from tests.kvjax import table_decoder

STEP = table_decoder.decoder(table_decoder.tables())

BUILD = {
    "zero budget": (lambda: methods.knorm(0), "budget must be at least 1 tokens .* got 0"),
    "negative budget": (lambda: methods.h2o(-5), "budget must be at least 1 tokens .* got -5"),
    "fraction above one": (lambda: methods.keydiff(1.2), r"budget as a fraction .* in \(0, 1\], got 1.2"),
    "budget of another type": (lambda: methods.tova("8"), "budget must be an int .* got '8'"),
    "budget below the window": (
        lambda: methods.snapkv(16, window=32),
        r"budget must be at least 32 tokens \(0 sinks and 32 recent tokens\), got 16",
    ),
    "budget below sinks and recent": (
        lambda: evict(scores.random(0), 9, sinks=4, recent=6),
        r"budget must be at least 10 tokens \(4 sinks and 6 recent tokens\), got 9",
    ),
    "ring without a recent token": (
        lambda: methods.streamingllm(4, sinks=4),
        r"budget must be at least 5 tokens \(4 sinks and one recent token\), got 4",
    ),
    "negative sinks of a ring": (lambda: ring(8, sinks=-1), "sinks must be at least 0, got -1"),
    "negative sinks": (lambda: evict(scores.random(0), 8, sinks=-1), "sinks and recent must be at least 0, got -1"),
    "negative recent": (lambda: evict(scores.random(0), 8, recent=-2), "recent must be at least 0, got 0 and -2"),
    "recent fraction": (lambda: methods.h2o(8, recent=1.5), "recent as a fraction .* at most 1, got 1.5"),
    "window of no queries": (lambda: scores.window_attention(0), "window must be at least 1 query, got 0"),
    "even kernel": (lambda: methods.snapkv(64, kernel=4), "kernel must be odd and at least 1, got 4"),
    "negative kernel": (lambda: methods.snapkv(64, kernel=-1), "kernel must be odd and at least 1, got -1"),
    "bad pooling": (lambda: methods.snapkv(64, pooling="sum"), "pooling must be 'avg' or 'max', got 'sum'"),
    "three bits": (lambda: methods.kivi(3), "bits must be 2, 4 or 8, got 3"),
    "no group": (lambda: methods.kivi(4, group=0), "key_group must be at least 1, got 0"),
    "no value group": (lambda: quantize(4, value_group=0), "value_group must be at least 1, got 0"),
    "no residual": (lambda: methods.kivi(4, residual=0), "residual must be at least 1, got 0"),
    "group not dividing residual": (
        lambda: methods.kivi(4, group=32, residual=48),
        "key_group must divide residual, .* got 32 and 48",
    ),
    "residual not filling words": (
        lambda: methods.kivi(2, group=8, residual=8),
        "residual must be a multiple of 16 for 2-bit words, got 8",
    ),
    "more than all heads": (
        lambda: methods.razorattention({"induction": jnp.zeros((2, 2)), "echo": jnp.zeros((2, 2))}, induction=1.5),
        r"induction must be a fraction of the heads in \[0, 1\], got 1.5",
    ),
    "window of the whole prompt": (
        lambda: kvjax.split_heads([(0,)], fraction=1.0),
        r"fraction must be in \[0, 1\), got 1.0",
    ),
    "every no tokens": (lambda: every(0, methods.knorm(8)), "n must be at least 1 token, got 0"),
    "no slack": (lambda: when_full(0, methods.knorm(8)), "slack must be at least 1 slot, got 0"),
    "full without a budget": (lambda: when_full(4, methods.full()), "when_full needs a transform with a token budget"),
}


@pytest.mark.parametrize("case", BUILD)
def test_a_method_that_cannot_be_is_refused_when_built(case):
    build, message = BUILD[case]
    with pytest.raises(ValueError, match=message):
        build()


def _prefill(transform, chunk=None, room=4, tokens=16):
    return jax.eval_shape(
        lambda cache: kvjax.prefill(
            STEP,
            transform,
            jnp.zeros((1, tokens), jnp.int32),
            jnp.array([tokens]),
            cache,
            room=room,
            chunk=chunk,
        ),
        table_decoder.empty(1),
    )


_heavy = lambda budget: evict(scores.accumulated_attention(), budget)

PREFILL = {
    "fraction below sinks and recent": (
        lambda: _prefill(evict(scores.random(0), 0.25, sinks=2, recent=4)),
        "budget must hold 2 sinks and 4 recent tokens, got 0.25 of 16 tokens = 4",
    ),
    "fraction of a ring below its sinks": (
        lambda: _prefill(methods.streamingllm(0.25, sinks=4)),
        "budget must hold more than 4 sinks, got 0.25 of 16 tokens = 4",
    ),
    "evict after quantize": (
        lambda: _prefill(chain(methods.kivi(4, 8, 8), methods.knorm(8))),
        "evict cannot follow quantize: it cannot work on packed codes",
    ),
    "ring after quantize": (
        lambda: _prefill(chain(methods.kivi(4, 8, 8), ring(8))),
        "ring cannot follow quantize: it cannot work on packed codes",
    ),
    "quantize twice": (
        lambda: _prefill(chain(methods.kivi(4, 8, 8), methods.kivi(4, 8, 8))),
        "quantize cannot follow quantize: it cannot work on packed codes",
    ),
    "value group not dividing the head": (
        lambda: _prefill(quantize(8, key_group=4, value_group=3, residual=8)),
        "group must divide the token group axis of length 8, got 3",
    ),
    "chunks for a score of all queries": (
        lambda: _prefill(kvjax.at_prefill_end(_heavy(8)), chunk=4),
        "chunk must be None for a transform that wants every query of the prompt",
    ),
    "chunks of nothing": (lambda: _prefill(methods.full(), chunk=0), "chunk must be at least 1 token or None, got 0"),
    "negative room": (lambda: _prefill(methods.full(), room=-1), "room must be at least 0 tokens, got -1"),
}


@pytest.mark.parametrize("case", PREFILL)
def test_a_method_that_does_not_fit_the_cache_is_refused_before_anything_runs(case):
    run, message = PREFILL[case]
    with pytest.raises(ValueError, match=message):
        run()


def test_the_same_scores_of_all_queries_take_chunks_when_they_act_at_each():
    for wrapped in (every_step(_heavy(8)), every_chunk(_heavy(8))):
        assert _prefill(wrapped, chunk=4).logits.shape == (1, 64)


@pytest.mark.parametrize("after", [methods.kivi(8, 8, 8), methods.kivi(4, 8, 8)])
@pytest.mark.parametrize("before", [methods.streamingllm(12), methods.streamingllm(12, reindex=False)])
def test_a_ring_is_not_quantized(before, after):
    # Blocks are written once; a ring overwrites its slots for ever. Nothing would free the body.
    with pytest.raises(ValueError, match="quantize cannot follow ring: it cannot work on a ring that overwrites"):
        chain(before, after)


# --- segments -----------------------------------------------------------------------------------------------------


def _segment(slots=8, batch=2, **static):
    return kvjax.DenseSegment.empty(batch, 2, slots, 8, jnp.float32, **static)


def _encode(slots):
    return kvjax.QuantizedSegment.encode(slots, bits=8, key_group=4, value_group=4)


_QUERIES = kvjax.Queries(jnp.zeros((2, 1, 4, 8)), jnp.zeros((2, 1), jnp.int32), kvjax.Rope.from_base(100.0, 8))
_KV = jnp.zeros((2, 2, 1, 8))

SEGMENT = {
    "shrinking": (lambda: _segment().resize(4), ValueError, "slots must be at least 8, got 4"),
    "mass of a shared prefix": (
        lambda: _segment(batch=1).mass(_QUERIES, jnp.zeros((2, 1, 4))),
        TypeError,
        "A prefix shared by the batch has no per-row attention mass",
    ),
    "ranks without a layer cache": (
        lambda: _segment(key_rope="rank").attend(_QUERIES),
        TypeError,
        "key_rope='rank' is read through its layer cache",
    ),
    "quantizing un-rotated keys": (
        lambda: _encode(_segment(key_rope="rank")),
        TypeError,
        "QuantizedSegment keeps rotated keys; got a segment with key_rope='rank'",
    ),
    "appending to packed slots": (
        lambda: _encode(_segment()).append(_KV, _KV, jnp.zeros((2, 1), jnp.int32), _QUERIES.rope),
        TypeError,
        "QuantizedSegment takes whole blocks; append through a BufferedSegment",
    ),
    "reserving packed slots": (
        lambda: _encode(_segment()).reserve(4),
        TypeError,
        "QuantizedSegment takes whole blocks; reserve through a BufferedSegment",
    ),
    "buffering merged slots": (
        lambda: BufferedSegment.from_dense(_segment().replace(bias=jnp.zeros((2, 2, 8))), _encode, 8),
        TypeError,
        "BufferedSegment cannot keep slots that stand for several tokens",
    ),
    "re-indexing packed slots": (
        lambda: BufferedSegment.from_dense(_segment(), _encode, 8).attend(_QUERIES, ranks=object()),
        TypeError,
        "BufferedSegment does not re-index positions",
    ),
}


@pytest.mark.parametrize("case", SEGMENT)
def test_what_a_segment_cannot_do_it_says(case):
    run, error, message = SEGMENT[case]
    with pytest.raises(error, match=message):
        run()


# --- check_step ---------------------------------------------------------------------------------------------------


def _checked(update):
    cache = kvjax.empty_cache(batch=1, layers=1, kv_heads=1, head_dim=4, slots=4)
    seen = kvjax.Observation((), new=jnp.ones(1, jnp.int32), prompt=jnp.ones(1, jnp.int32), prompt_slots=4)
    kvjax.check_step(kvjax.identity()._replace(update=update), cache, (), seen)


def test_a_step_that_keeps_everything_passes():
    _checked(lambda cache, state, observation: (cache, state))


def test_a_step_that_grows_a_leaf_is_told_which():
    with pytest.raises(ValueError, match=r"layers\[0\].segments\[0\].k was float32\[1, 1, 4, 4\] and became .*5, 4"):
        _checked(lambda cache, state, observation: (cache.reserve(1), state))


def test_a_step_that_changes_a_dtype_is_told_which():
    with pytest.raises(ValueError, match=r"length was int32\[1\] and became float32\[1\]"):
        _checked(lambda cache, state, observation: (cache.replace(length=cache.length * 1.0), state))


def test_a_step_that_changes_the_tree_is_told_both():
    with pytest.raises(ValueError, match="step must keep the cache's tree"):
        _checked(lambda cache, state, observation: (cache, (jnp.zeros(1),)))


def test_attention_over_no_segments_is_refused():
    with pytest.raises(ValueError, match="partials must hold at least one Partial"):
        kvjax.combine([])
