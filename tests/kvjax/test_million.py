"""MILLION in a running cache: which tokens are codes when, and of which centroids; and where centroids come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from kvjax.calibration import product_codebook
from kvjax.segments.bases import Matrix
from tests.kvjax import table_decoder
from tests.pallas_kernels.test_product_quantize import nearest
from tests.quick_jit import quick_jit

TABLES = table_decoder.tables()
STEP = table_decoder.decoder(TABLES)
T, LENGTHS, NEW, RESIDUAL = 40, (40, 27), 21, 16
L, H = table_decoder.LAYERS, table_decoder.HEAD_DIM


def _stored(tokens: np.ndarray, layer: int, calibration) -> tuple[np.ndarray, np.ndarray]:
    """The paper's cache of one row, [K, n, H]: whole blocks as nearest centroids, the rest exact."""
    n = len(tokens)
    coded = n // RESIDUAL * RESIDUAL
    k = table_decoder.turn(TABLES.k[layer, tokens].swapaxes(0, 1).astype(np.float64), np.arange(n))
    v = TABLES.v[layer, tokens].swapaxes(0, 1).astype(np.float64)
    for x, name in ((k, "key_codebook"), (v, "value_codebook")):
        book = np.asarray(calibration[name][layer], np.float64)
        code = nearest(x[None, :, :coded], book)[0]
        x[:, :coded] = book[np.arange(len(book)), code].reshape(len(x), coded, H)
    return k, v


@pytest.mark.parametrize("parts, centroids", [(4, 16), (2, 256)])
def test_the_cache_holds_what_the_paper_stores_after_the_prompt_and_while_decoding(parts, centroids):
    rng = np.random.default_rng(0)
    shape = (L, parts, centroids, H // parts)
    calibration = {name: jnp.float32(rng.normal(size=shape)) for name in ("key_codebook", "value_codebook")}
    method = methods.million(calibration, RESIDUAL, codebook_dtype="float32")
    tokens = table_decoder.distinct_tokens(2, T + NEW)
    run = quick_jit(
        lambda prompt, cache: kvjax.prefill(STEP, method, prompt, jnp.array(LENGTHS), cache, room=NEW)
    )(jnp.int32(tokens[:, :T]), table_decoder.empty(2))
    extend = quick_jit(
        lambda run, new: kvjax.extend(STEP, method, run, new, jnp.ones(2, jnp.int32))[0]
    )
    for t in range(NEW + 1):
        if t:
            new = tokens[[0, 1], [length + t - 1 for length in LENGTHS]]
            run = extend(run, jnp.int32(new[:, None]))
        if t not in (0, 7, 8, NEW):  # row 0 fills a block with its 8th token, row 1 with its 5th and 21st
            continue
        for layer in range(L):
            segment = run.cache.layers[layer].segments[-1]
            dense = segment.dense()
            for row, length in enumerate(LENGTHS):
                mine = tokens[row, : length + t]
                pos = np.asarray(dense.pos[row])
                order = np.argsort(np.where(pos < 0, 10**6, pos), axis=-1)[:, : len(mine)]
                assert (np.take_along_axis(pos, order, axis=-1) == np.arange(len(mine))).all()
                assert (np.asarray(segment.tail.pos[row]) >= 0).sum() == 2 * (len(mine) % RESIDUAL)
                for got, want in zip((dense.k, dense.v), _stored(mine, layer, calibration)):
                    got = np.take_along_axis(np.asarray(got[row]), order[..., None], axis=1)
                    # Equal, but for a vector in a thousand halfway between two centroids.
                    assert (np.abs(got - want) > 1e-4).mean() < 1e-3


def test_bytes_are_half_a_byte_a_number_beside_positions():
    calibration = {name: jnp.zeros((L, H // 2, 256, 2)) for name in ("key_codebook", "value_codebook")}
    bytes_of = lambda tokens: kvjax.nbytes(
        jax.eval_shape(
            lambda cache: kvjax.prefill(
                STEP,
                methods.million(calibration, 16),
                jnp.zeros((1, tokens), jnp.int32),
                jnp.array([tokens]),
                cache,
                room=16,
            ),
            table_decoder.empty(1),
        ).cache
    )
    assert bytes_of(512) - bytes_of(256) == 256 * L * table_decoder.KV_HEADS * (2 * H // 2 + 4)


def test_lloyd_finds_clusters_and_does_not_depend_on_anything_but_the_seed():
    rng = np.random.default_rng(0)
    centers = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    x = np.concatenate([centers[rng.integers(0, 4, 400)] for _ in range(2)], axis=1)
    x = jnp.float32(x + 0.1 * rng.normal(size=x.shape))
    fit = jax.jit(product_codebook, static_argnums=(1, 2))
    found = np.asarray(fit(x, 2, 4, jax.random.key(0)))
    assert found.shape == (2, 4, 2)
    for part in found:
        order = np.lexsort((part[:, 0].round(), part[:, 1].round()))
        np.testing.assert_allclose(part[order], centers, atol=0.05)
    np.testing.assert_array_equal(found, fit(x, 2, 4, jax.random.key(0)))


def test_more_iterations_fit_better_and_more_centroids_fit_all():
    x = jnp.float32(np.random.default_rng(1).normal(size=(200, 4)))

    def error(centroids, iterations):
        book = np.asarray(product_codebook(x, 2, centroids, jax.random.key(1), iterations))
        code = nearest(np.asarray(x)[None, None], book)[0, 0]
        return float(np.mean((book[np.arange(2), code].reshape(-1, 4) - x) ** 2))

    assert error(16, 12) < 0.95 * error(16, 0)
    assert error(200, 0) < 1e-12  # every vector is a seed


def test_coordinates_of_a_projection_may_have_a_codebook():
    """Keys and values are the nearest centroids of their coordinates, expanded."""
    rng = np.random.default_rng(3)
    tokens = table_decoder.distinct_tokens(1, 32)
    rank, bases = 4, []
    for _ in range(L):
        axes = np.linalg.qr(rng.normal(size=(2, TABLES.k.shape[2], H, H)))[0][..., :rank]
        bases.append(jnp.float32(axes))
    books = jnp.float32(rng.normal(size=(L, 2, rank // 2, 16, 2)))
    project = kvjax.project([tuple(Matrix(axes[None]) for axes in of_layer) for of_layer in bases])
    coded = kvjax.product_quantize([tuple(books[layer]) for layer in range(L)], residual=RESIDUAL, of="coordinates")
    run = quick_jit(
        lambda prompt, cache: kvjax.prefill(STEP, kvjax.chain(project, coded), prompt, jnp.array([32]), cache, room=1)
    )(jnp.int32(tokens), table_decoder.empty(1))
    for layer in range(L):
        dense = run.cache.layers[layer].segments[-1].dense()
        order = np.argsort(np.where(np.asarray(dense.pos[0]) < 0, 10**6, dense.pos[0]), axis=-1)[:, :32, None]
        k = table_decoder.turn(TABLES.k[layer, tokens[0]].swapaxes(0, 1).astype(np.float64), np.arange(32))
        v = TABLES.v[layer, tokens[0]].swapaxes(0, 1).astype(np.float64)
        for x, axes, book, held in zip((k, v), bases[layer], books[layer], (dense.k, dense.v)):
            coordinates, book = x @ np.asarray(axes, np.float64), np.asarray(book, np.float64)
            code = nearest(coordinates[None], book)[0]
            coordinates = book[np.arange(len(book)), code].reshape(coordinates.shape)
            expected = coordinates @ np.asarray(axes, np.float64).swapaxes(-1, -2)
            np.testing.assert_allclose(np.take_along_axis(np.asarray(held[0]), order, axis=1), expected, atol=1e-5)
    with pytest.raises(ValueError, match="product_quantize cannot follow project: it needs all channels"):
        kvjax.chain(project, kvjax.product_quantize([tuple(books[layer]) for layer in range(L)], residual=RESIDUAL))
    with pytest.raises(ValueError, match="codebooks must be of the channels of k, 8, got 2 x 2"):
        wrong = kvjax.chain(kvjax.identity(), coded)
        kvjax.prefill(STEP, wrong, jnp.int32(tokens), jnp.array([32]), table_decoder.empty(1), room=1)
