"""GEAR against the paper's steps in NumPy: what a running cache holds, and how it is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Queries, Rope, Segment, quantize_corrected
from kvjax.codecs import Affine
from kvjax.codecs.low_rank import factorize, start
from kvjax.codecs.outliers import count_outliers
from tests.kvjax import table_decoder
from tests.kvjax.encoders import corrected
from tests.pallas_kernels.attention_numpy import attention
from tests.pallas_kernels.kivi_numpy import kivi_quantizer
from tests.quick_jit import quick_jit

TABLES = table_decoder.tables()
STEP = table_decoder.decoder(TABLES)
T, LENGTHS, NEW, GROUP, BLOCK, RANK = 40, (40, 27), 9, 8, 16, 2


def _gear(x: np.ndarray, bits: int, axis: int, outliers: int) -> np.ndarray:
    """GEAR, algorithm 1 of one block x [n, H] of one head, in float64.

    Takes `outliers` largest and smallest of every vector along `axis` out, quantizes the rest with their places
    filled by the mean, and approximates what is then missing by power iteration (algorithm 2).
    """
    order = np.argsort(x, axis=axis, kind="stable")
    chosen = np.zeros(x.shape, bool)
    if outliers:
        for part in (np.take(order, range(outliers), axis), np.take(order, range(-outliers, 0), axis)):
            np.put_along_axis(chosen, part, True, axis=axis)
    filled = np.where(chosen, x.mean(axis=axis, keepdims=True), x)
    restored = kivi_quantizer(filled[None, None], bits, GROUP, axis=axis + 2)[1][0, 0]
    restored = np.where(chosen, x, restored)
    error, a = x - restored, np.asarray(start(x.shape[1], RANK), np.float64)
    for loop in range(3):
        if loop == 2:
            a = np.linalg.qr(a)[0]
        p = error @ a
        if loop == 2:
            p = np.linalg.qr(p)[0]
        a = error.T @ p
    return restored + p @ a.T


def _stored(tokens: np.ndarray, bits: int, layer: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The paper's cache of one row, [K, n, H]."""
    whole = len(tokens) // BLOCK * BLOCK
    k = table_decoder.turn(TABLES.k[layer, tokens].swapaxes(0, 1).astype(np.float64), np.arange(len(tokens)))
    v = TABLES.v[layer, tokens].swapaxes(0, 1).astype(np.float64)
    for x, axis, length in ((k, 0, BLOCK), (v, 1, table_decoder.HEAD_DIM)):
        for head in range(len(x)):
            for at in range(0, whole, BLOCK):
                block = np.s_[head, at : at + BLOCK]
                x[block] = _gear(x[block], bits, axis, count_outliers(fraction, length))
    return k, v


@pytest.mark.parametrize("bits, fraction", [(2, 0.125), pytest.param(4, 0.0, marks=pytest.mark.slow)])
def test_the_cache_holds_what_the_paper_stores_after_the_prompt_and_while_decoding(bits, fraction):
    method = quantize_corrected(
        bits, rank=RANK, outliers=fraction, key_group=GROUP, value_group=GROUP, block=BLOCK, scale_dtype="float32"
    )
    tokens = table_decoder.distinct_tokens(2, T + NEW)
    run = quick_jit(
        lambda prompt, cache: kvjax.prefill(STEP, method, prompt, jnp.array(LENGTHS), cache, room=NEW)
    )(jnp.int32(tokens[:, :T]), table_decoder.empty(2))
    extend = quick_jit(
        lambda run, new: kvjax.extend(STEP, method, run, new, jnp.ones(2, jnp.int32))[0]
    )
    rows = [list(tokens[row, :length]) for row, length in enumerate(LENGTHS)]
    off = []
    for t in range(NEW + 1):
        if t:
            new = tokens[[0, 1], [length + t - 1 for length in LENGTHS]]
            run = extend(run, jnp.int32(new[:, None]))
            for row in range(2):
                rows[row].append(new[row])
        if t not in (0, NEW):  # row 0 fills its third block with its 8th new token, row 1 its second with its 5th
            continue
        for layer in range(table_decoder.LAYERS):
            dense = run.cache.layers[layer].segments[-1].dense()
            for row in range(2):
                n = len(rows[row])
                pos = np.asarray(dense.pos[row])
                order = np.argsort(np.where(pos < 0, 10**6, pos), axis=-1)[:, :n]
                for got, want in zip((dense.k, dense.v), _stored(np.array(rows[row]), bits, layer, fraction)):
                    got = np.take_along_axis(np.asarray(got[row]), order[..., None], axis=1)
                    off.append(np.abs(got - want).reshape(2, -1).max(axis=-1))
    # Equal, but for a head with a code on a tie that rounds the other way, and its block's factors with it.
    assert (np.concatenate(off) > 1e-3).mean() < 0.05 and np.max(off) < 6.0


def _encoder(bits: int, key_group: int, value_group: int, **how):
    block = how["block"]
    codes = Affine.of_blocks(bits, key_group, "channel", block=block), Affine.of_blocks(
        bits, value_group, "token", block=block
    )
    return quick_jit(lambda slots: corrected(slots, codes, **how))


_dense = quick_jit(lambda segment: segment.dense())


def test_low_rank_and_outliers_each_take_error_away():
    rng = np.random.default_rng(0)
    k, v = jnp.float32(rng.normal(size=(2, 1, 2, 128, 32)))
    k = k.at[:, :, ::37].multiply(8.0)  # a few large keys
    slots = Segment.of(k, v, jnp.tile(jnp.arange(128), (1, 2, 1)))
    error = {}
    for rank, outliers in ((0, 0.0), (3, 0.0), (0, 0.05), (3, 0.05)):
        got = _dense(_encoder(2, 32, 32, block=32, rank=rank, outliers=outliers)(slots))
        error[rank, outliers] = [np.square(np.asarray(a) - b).mean() for a, b in ((got.k, k), (got.v, v))]
    for which in range(2):
        at = {key: value[which] for key, value in error.items()}
        assert at[0, 0.0] > at[3, 0.0] and at[0, 0.0] > at[0, 0.05] > at[3, 0.05]
    assert error[0, 0.05][0] < 0.5 * error[0, 0.0][0]  # one large key a channel no longer widens its range


@pytest.mark.parametrize("slots", [32, 32 * 35])  # one tile, and more than two
def test_tiles_read_as_the_dense_slots_do(slots):
    rng = np.random.default_rng(1)
    k, v = jnp.float32(rng.normal(size=(2, 2, 2, slots, 16)))
    pos = jnp.tile(jnp.arange(slots), (2, 2, 1)).at[1, :, slots - 20 :].set(-1)
    segment = _encoder(2, 16, 8, block=32, rank=3, outliers=0.1)(Segment.of(k, v, pos))
    queries = Queries(
        jnp.float32(rng.normal(size=(2, 3, 4, 16))),
        jnp.array([[slots - 2, slots - 1, slots], [slots - 22, slots, -1]]),
        Rope.from_base(100.0, 16),
    )
    got = quick_jit(lambda part, queries: part.attend(queries, window=slots - 5))(segment, queries)
    dense = _dense(segment)
    out, lse, _ = attention(queries.rotated, dense.k, dense.v, queries.pos, dense.pos, window=slots - 5)
    np.testing.assert_allclose(got.out, out, rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(got.lse, lse, rtol=3e-5, atol=3e-5)


def test_the_program_of_a_read_holds_no_expanded_copy():
    slots = 32 * 64
    shape = jax.ShapeDtypeStruct
    numbers = shape((1, 2, slots, 16), jnp.float32)
    dense = Segment.of(numbers, numbers, shape((1, 2, slots), jnp.int32))
    segment = jax.eval_shape(_encoder(2, 16, 8, block=32, rank=3, outliers=0.1), dense)
    queries = Queries(shape((1, 1, 4, 16), jnp.float32), shape((1, 1), jnp.int32), Rope.from_base(100.0, 16))
    text = jax.jit(lambda part, queries: part.attend(queries)).lower(segment, queries).compile().as_text()
    assert "[1,2,512,16]" in text  # a tile
    assert "[1,2,2048,16]" not in text and "[1,2,64,32,16]" not in text


def test_factors_of_a_matrix_of_low_rank_are_the_matrix_and_of_nothing_nothing():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 2, 2, 8, 1)) @ rng.normal(size=(1, 2, 2, 1, 8)) * np.float64(100.0)
    x = jnp.float32(x.reshape(1, 2, 16, 8)).at[0, 1, 8:].set(0.0)
    factors = quick_jit(lambda x: factorize(x, rank=3, block=8, loops=2, dtype="float32"))(x)
    product = np.einsum(
        "bkrns,bknrh->bknsh",
        np.asarray(factors.tokens).reshape(1, 2, 3, 2, 8),
        np.asarray(factors.channels).reshape(1, 2, 2, 3, 8),
    )
    np.testing.assert_allclose(product.reshape(x.shape), x, atol=1e-3)  # of entries up to 400
    assert not factors.channels[0, 1, 3:].any() and not factors.tokens[0, 1, :, 8:].any()
