"""Everything kvjax refuses, it refuses with a sentence that names the argument and says what came."""

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import chain, every, every_chunk, every_step, evict, methods, quantize, ring, scores, when_full
from kvjax.segments.bases import Matrix
from kvjax.segments.hadamard import Hadamard
from tests.kvjax import table_decoder
from tests.kvjax.encoders import affine

STEP = table_decoder.decoder(table_decoder.tables())


def _rotatekv(**how):
    return methods.rotatekv({"key_mean": jnp.zeros((1, 2, 8))}, **how)


def _protected(slots):
    return kvjax.protect(methods.kivi(4), scores.negative_key_norm(), slots)


def _million(centroids, residual=16):
    return methods.million(dict.fromkeys(("key_codebook", "value_codebook"), jnp.zeros((1, 4, centroids, 2))), residual)


def _reread(chunk):
    return evict(scores.reconstruction(kvjax.Reread(chunk=chunk)), 8)


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
    "no weight of entropy": (lambda: methods.cake(64, tau_entropy=0), "tau_entropy and tau_variance .* got 0 and 1.0"),
    "cake below its window": (lambda: methods.cake(16), r"budget must be at least 32 tokens .* got 16"),
    "chunks of nothing to reread": (lambda: methods.kvzip(chunk=0), "chunk must be at least 1 token, got 0"),
    "negative overlap": (lambda: methods.kvzip(overlap=-1), "overlap must be at least 0 tokens, got -1"),
    "kvzip below its sinks": (lambda: methods.kvzip(2), r"budget must be at least 4 tokens \(4 sinks .* got 2"),
    "pages of nothing": (lambda: methods.kvzip(page=0), "page must be at least 1 slot, got 0"),
    "no way to split over layers": (
        lambda: kvjax.evict_across_layers(scores.random(0), 8),
        "heads or layers must be given, and not both",
    ),
    "two ways to read again": (
        lambda: chain(_reread(64), _reread(32)),
        "methods that read a prompt again must do so in the same way",
    ),
    "bad pooling": (lambda: methods.snapkv(64, pooling="sum"), "pooling must be 'avg' or 'max', got 'sum'"),
    "bits that rise with age": (lambda: methods.saq((2, 4), (1,)), "bits must be falling numbers out of 8, 4, 3 and 2"),
    "a band too many": (lambda: methods.saq((8, 2), (1, 1)), "blocks must be 1 counts of at least 1 for 2 bands"),
    "all channels dropped": (lambda: methods.mustafar(1.0), r"key_sparsity must be in \[0, 1\), got 1.0"),
    "no wide channels": (lambda: methods.vidkv(0.0), r"fraction must be in \(0, 1\), got 0.0"),
    "sketches of nothing": (lambda: methods.qjl(0.0), "width must be above 0, got 0.0"),
    "a negative power": (lambda: methods.qserve(power=-1.0), "power must be above 0, got -1.0"),
    "a giver that reads another": (lambda: kvjax.transforms.share_layers([0, 0, 1]), "givers must be layers that read"),
    "a head twice": (lambda: kvjax.transforms.project_by_group([], [(0,), (0,)]), "groups must name each head once"),
    "five bits": (lambda: methods.kivi(5), "bits must be 2, 3, 4 or 8, got 5"),
    "no group": (lambda: methods.kivi(4, group=0), "key_group must be a whole number of at least 1, got 0"),
    "no value group": (lambda: quantize(4, value_group=0), "value_group must be a whole number of at least 1, got 0"),
    "chunks of what frees nothing": (lambda: every_chunk(methods.kivi(4)), "quantize frees no slots while the prompt"),
    "scales of no group": (lambda: quantize(4, key_group=None), "key_group must say how many tokens share a scale"),
    "half a residual": (lambda: quantize(4, residual=8.0), "residual must be a whole number of tokens"),
    "scales of another kind": (lambda: quantize(4, scale_dtype="float7"), "scale_dtype must be 'bfloat16'"),
    "no residual": (lambda: methods.kivi(4, residual=0), "residual must be at least 1 where scales are shared over"),
    "group not dividing residual": (
        lambda: methods.kivi(4, group=32, residual=48),
        "key_group must divide residual, .* got 32 and 48",
    ),
    "residual not filling words": (
        lambda: methods.kivi(2, group=8, residual=8),
        "residual must be a multiple of 16 for 2-bit words, got 8",
    ),
    "budget of a merge below its sinks": (
        lambda: methods.d2o(3),
        r"budget must be at least 5 tokens \(4 sinks and 1 recent tokens\), got 3",
    ),
    "smoothing above one": (lambda: methods.d2o(8, smoothing=1.5), r"smoothing must be in \[0, 1\], got 1.5"),
    "no cosine": (lambda: methods.kvmerger(threshold=2.0), r"threshold must be a cosine in \[-1, 1\], got 2.0"),
    "kernel without width": (lambda: methods.kvmerger(width=0.0), "width must be above 0, got 0.0"),
    "heavy above the budget": (lambda: methods.kvmerger(heavy=1.2), r"heavy must be a fraction .* got 1.2"),
    "five written bits": (lambda: quantize(4, written_bits=5), "written_bits must be 2, 3, 4 or 8, got 5"),
    "keys along nothing": (lambda: quantize(4, key_axis="head"), "key_axis must be 'channel' or 'token', got 'head'"),
    "rank above the block": (
        lambda: methods.gear(2, group=32, block=32, rank=33),
        "rank must be from 0 to the 32 tokens of a block, got 33",
    ),
    "all outliers": (lambda: methods.gear(outliers=1.0), r"outliers must be a fraction in \[0, 1\), got 1.0"),
    "no power iteration": (lambda: methods.gear(loops=0), "loops must be at least 1, got 0"),
    "important tokens fewer than the newest": (
        lambda: methods.mikv(8, recent=16),
        r"budget must be at least 16 tokens \(0 sinks and 16 recent tokens\), got 8",
    ),
    "block not filling words": (
        lambda: methods.gear(2, group=8, block=8),
        "block must be a multiple of 16 for 2-bit words, got 8",
    ),
    "five important bits": (lambda: methods.mikv(8, important_bits=5), "bits must be 2, 3, 4 or 8, got 5"),
    "balance of nothing": (lambda: kvjax.balance_channels("head"), "where must be 'tail' or 'written', got 'head'"),
    "balance of what was not split": (
        lambda: chain(methods.snapkv(64), kvjax.balance_channels("written")),
        "balance_channels needs slots in two segments, by their worth, which nothing before it makes",
    ),
    "keys along another axis": (lambda: quantize(4, key_axis="head"), "key_axis must be 'channel' or 'token', got"),
    "no range": (lambda: quantize(4, clip=0.0), r"clip must be in \(0, 1\], got 0.0"),
    "rotated heads that do not divide": (lambda: _rotatekv(heads=4), "heads must divide the 2 KV heads, got 4"),
    "rotation of six channels": (
        lambda: methods.rotatekv({"key_mean": jnp.zeros((1, 2, 6))}, heads=1),
        "a Walsh-Hadamard rotation needs a power of two, got 6",
    ),
    "channels without a group": (lambda: _rotatekv(group=3), "group must divide the 8 channels of a head, got 3"),
    "words of rotated codes": (lambda: _rotatekv(residual=8), "residual must be a multiple of 16 for 2-bit words"),
    "no massive entries": (lambda: scores.massive_activations(0), "entries must be at least 1, got 0"),
    "negative protection": (lambda: _protected(-1), "slots must be at least 0, got -1"),
    "protection from what acts later": (
        lambda: kvjax.protect(methods.h2o(8), scores.negative_key_norm(), 4),
        "protect needs a transform that acts once, at the prompt's end; evict acts later",
    ),
    "protection with statistics": (
        lambda: kvjax.protect(methods.kivi(4), scores.accumulated_attention(), 4),
        "protect needs a scorer without statistics",
    ),
    "protection by head of what heads share": (
        lambda: kvjax.protect(kvjax.project_jointly([]), scores.negative_key_norm(), 4),
        "project_jointly needs the same tokens in every head; this scorer protects others in each",
    ),
    "mixed heads read one by one": (
        lambda: kvjax.project([(Hadamard(heads=2), None)]),
        "bases that mix heads suit only keys with key_rope='at_attend'",
    ),
    "rope of coordinates": (lambda: kvjax.project([], key_rope="rank"), "key_rope must be 'stored' or 'at_attend'"),
    "no codebooks": (lambda: kvjax.product_quantize([]), "codebooks must be of at least one layer, got none"),
    "centroids that do not pack": (lambda: _million(8), "codebook must have 4, 16, 64, ... or 16384 centroids, got 8"),
    "words of codes": (lambda: _million(16, 12), "residual must be a positive multiple of 8 .*, got 12"),
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
    "a group of no layers": (lambda: methods.xkv(0), "layers must be at least 1, got 0"),
    "rank of nothing": (lambda: methods.xkv(4, 0), "key_rank must be a count of at least 1 or a fraction .* got 0"),
    "rank above the whole": (lambda: methods.xkv(4, 1, 1.5), r"value_rank .* a fraction in \(0, 1\], got 1.5"),
    "start beyond the model": (lambda: methods.minicache(1.0), r"start must be .* a fraction in \[0, 1\), got 1.0"),
    "retaining more than all": (lambda: methods.minicache(retain=1.2), "retain must be .* got 1.2"),
    "direction off the arc": (lambda: methods.minicache(interpolation=2), r"interpolation must be in \[0, 1\], got 2"),
    "full without a budget": (lambda: when_full(4, methods.full()), "when_full needs a transform with a token budget"),
    "full at a prompt's end": (lambda: when_full(4, methods.knorm(8)), "says what it holds above it, .* got evict"),
    "every token at a prompt's end": (lambda: every(4, methods.knorm(8)), "evict acts on the prompt alone"),
    "reuse by no layers": (lambda: evict(scores.random(0), 8, reuse=0), "reuse must be at least 1 layer, got 0"),
    "reuse of statistics": (
        lambda: evict(scores.accumulated_attention(), 8, reuse=2),
        "reuse must be 1 for a scorer that keeps statistics of each layer, got 2",
    ),
    "a blend of nothing": (lambda: scores.blend([]), "blend needs at least one pair"),
    "a blend of sums and a window": (
        lambda: scores.blend([(1.0, scores.accumulated_attention()), (1.0, scores.window_attention(4))]),
        r"scorers must all add up attention, or all look at the last queries, got \[4\] queries",
    ),
    "the same statistic twice": (
        lambda: scores.strongest(scores.accumulated_attention(), scores.accumulated_attention()),
        "statistics of different names to be joined, got attention, attention",
    ),
    "blocks of no tokens": (lambda: scores.in_blocks(scores.random(0), 0), "size must be at least 1 token"),
    "more than a block": (lambda: scores.in_blocks(scores.random(0), 4, 5), "top at most size or None, got 4 and 5"),
    "no last queries": (lambda: scores.end_attention(0), "last must be at least 1 query, .* got 0"),
    "a crowd of representatives": (
        lambda: scores.crushed(scores.random(0), 1.5),
        r"share must be in \[0, 1\], got 1.5",
    ),
    "a steep line": (lambda: kvjax.pyramid(0.5), "beta must be at least 1, got 0.5"),
    "a flat curve": (lambda: kvjax.by_coverage([[1.0]]), "coverage must be a curve of at least two points"),
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


_joint = lambda window: kvjax.at_prefill_end(
    kvjax.project_jointly(2 * [2 * (Matrix(jnp.zeros((1, 2, 8, 8))),)], window=window)
)
_heavy = lambda budget: evict(scores.accumulated_attention(), budget)

PREFILL = {
    "a whole layer that is not there": (
        lambda: _prefill(methods.kvmerger(8, whole=(5,))),
        r"whole must name layers of the 2 there are, got \(5,\)",
    ),
    "variance of another model": (
        lambda: _prefill(methods.d2o(8, calibration={"variance": [0.1] * 3}, whole=())),
        "variance is of 3 layers, but the cache has 2",
    ),
    "merge after quantize": (
        lambda: _prefill(chain(methods.kivi(4, 8, 8), methods.d2o(8))),
        "merge cannot follow quantize: it needs slots that are kept and dropped one by one",
    ),
    "evict after quantize": (
        lambda: _prefill(chain(methods.kivi(4, 8, 8), methods.knorm(8))),
        "evict cannot follow quantize: it needs slots that are kept and dropped one by one",
    ),
    "ring after quantize": (
        lambda: _prefill(chain(methods.kivi(4, 8, 8), ring(8))),
        "ring cannot follow quantize: it needs slots that are kept and dropped one by one",
    ),
    "quantize twice": (
        lambda: _prefill(chain(methods.kivi(4, 8, 8), methods.kivi(4, 8, 8))),
        "quantize cannot follow quantize: it needs stored numbers that are no codes yet",
    ),
    "coordinates in blocks of another length": (
        lambda: _prefill(chain(_joint(5), methods.kivi(4, 8, 8))),
        "blocks of 5 tokens, which are written together, must hold whole groups and words: multiples of 8",
    ),
    "value group not dividing the head": (
        lambda: _prefill(quantize(8, key_group=4, value_group=3, residual=8)),
        "group must divide the token group axis of length 8, got 3",
    ),
    "chunks for a score of all queries": (
        lambda: _prefill(kvjax.at_prefill_end(evict(scores.call_attention(), 8)), chunk=4),
        "chunk must be None for a transform that wants every query of the prompt",
    ),
    "reading again what is not there any more": (
        lambda: _prefill(every_chunk(_reread(64)), chunk=4),
        "chunk must be None for evict, which reads the whole prompt again",
    ),
    "rank above the group's width": (
        lambda: _prefill(methods.xkv(2, 40)),
        "key_rank must be at most the 32 channels of a group, got 40",
    ),
    "no layers to merge": (lambda: _prefill(methods.minicache()), "start must leave two layers .* got 0.5 of 2 layers"),
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


@pytest.mark.parametrize("before", [methods.streamingllm(12), methods.streamingllm(12, reindex=False)])
def test_a_ring_is_not_encoded_in_blocks_alone(before):
    # Blocks are written once; a ring overwrites its slots for ever. Corrections belong to whole blocks.
    with pytest.raises(ValueError, match="quantize_corrected cannot follow ring: it needs slots that new"):
        chain(before, methods.gear(2, group=8, block=16))


def _prefix(layers=2, heads=2, channels=8):
    return methods.reasoncache(dict.fromkeys(("key", "value"), jnp.zeros((layers, heads, 3, channels))))


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(layers=3), "prefix is of 3 layers, the cache has 2"),
        (dict(heads=4), r"keys and values of 2 heads of 8 channels, got \[4, 3, 8\] and \[4, 3, 8\]"),
        (dict(channels=6), r"keys and values of 2 heads of 8 channels, got \[2, 3, 6\]"),
    ],
)
def test_a_prefix_of_another_model_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        _prefill(_prefix(**other))


def test_a_prompt_that_was_read_without_its_prefix_is_refused():
    with pytest.raises(ValueError, match="prefix and evict puts something before the prompt, which was read without"):
        kvjax.start(chain(_prefix(), methods.knorm(4)), None, None, room=1)


# --- segments -----------------------------------------------------------------------------------------------------


def _segment(slots=8, batch=2, **static):
    return kvjax.Segment.empty(batch, 2, slots, 8, jnp.float32, **static)


def _encode(slots):
    return affine(slots, bits=8, key_group=4, value_group=4)


def _scaled(slots):
    ones = jnp.ones(slots.pos.shape)
    return slots.replace(k=kvjax.codecs.Scaled(slots.k, ones), v=kvjax.codecs.Scaled(slots.v, ones))


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
        "Keys that are read at ranks are read through their layer cache",
    ),
    "appending to packed slots": (
        lambda: _encode(_segment()).append(_KV, _KV, jnp.zeros((2, 1), jnp.int32), _QUERIES.rope),
        TypeError,
        "These slots take whole blocks; append through a BlockedSegment",
    ),
    "appending to vectors with lengths of their own": (
        lambda: _scaled(_segment()).append(_KV, _KV, jnp.zeros((2, 1), jnp.int32), _QUERIES.rope),
        TypeError,
        "slots with lengths of their own are written once; new tokens go to the segment behind them",
    ),
    "reserving packed slots": (
        lambda: _encode(_segment()).reserve(4),
        TypeError,
        "These slots take whole blocks; reserve through a BlockedSegment",
    ),
    "one vector for heads that merged differently": (
        lambda: kvjax.LatentSegment.of(_segment().with_slots(bias=jnp.zeros((2, 2, 8))), None, None, joint=True),
        TypeError,
        "A joint LatentSegment cannot keep slots that each head has merged in its own way",
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
    kvjax.check_step(kvjax.CacheTransform(kvjax.identity().init, update), cache, (), seen)


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
