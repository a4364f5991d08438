"""RotateKV in a running cache: which tokens are sinks, and what the others are stored as."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from kvjax.observation import LargestInputs
from kvjax.segments.hadamard import Hadamard
from tests.kvjax import table_decoder
from tests.quick_jit import quick_jit

TABLES = table_decoder.tables()
STEP = table_decoder.decoder(TABLES)
T, LENGTHS, NEW, RESIDUAL, SINKS = 40, (40, 27), 12, 16, 4
K, H = table_decoder.KV_HEADS, table_decoder.HEAD_DIM
CALIBRATION = {"key_mean": jnp.float32(np.random.default_rng(5).normal(size=(table_decoder.LAYERS, K, H)))}


def walsh_hadamard(x: np.ndarray) -> np.ndarray:
    """The fast transform of the last axis, by butterflies, divided by the root of its length."""
    x, n, half = np.array(x, np.float64), x.shape[-1], 1
    while half < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        x = x.reshape(*x.shape[:-3], n)
        half *= 2
    return x / np.sqrt(n)


def quantizer(x: np.ndarray, bits: int, clip: float) -> np.ndarray:
    """Per token, one group: min/max, the range clipped around its middle."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    middle, half = (low + high) / 2, clip * (high - low) / 2
    scale = 2 * half / (2**bits - 1)
    return np.clip(np.rint((x - middle + half) / scale), 0, 2**bits - 1) * scale + middle - half


def _coordinates(tokens: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The paper's fused weights: un-rotated keys of two heads together, reordered by mean; values head by head."""
    k, v = (x[layer, tokens].astype(np.float64) for x in (TABLES.k, TABLES.v))  # [n, K, H]
    order = np.argsort(walsh_hadamard(np.asarray(CALIBRATION["key_mean"])[layer].reshape(K * H)), kind="stable")
    k = walsh_hadamard(k.reshape(-1, K * H))[:, order].reshape(-1, K, H)
    return k.swapaxes(0, 1), walsh_hadamard(v).swapaxes(0, 1)


def _sinks(tokens: np.ndarray, layer: int) -> np.ndarray:
    """Positions that own the SINKS largest entries of the prompt's inputs."""
    inputs = np.abs(TABLES.q[layer, tokens].reshape(len(tokens), -1))
    return np.unique(np.argsort(-inputs, axis=None)[:SINKS] // inputs.shape[1])


@pytest.mark.parametrize("bits, clip, chunk", [(2, 0.8, None), (4, 1.0, 9)])
def test_the_cache_holds_what_the_paper_stores_after_the_prompt_and_while_decoding(bits, clip, chunk):
    method = methods.rotatekv(CALIBRATION, bits, sinks=SINKS, residual=RESIDUAL, scale_dtype="float32")
    tokens = table_decoder.distinct_tokens(2, T + NEW)
    run = quick_jit(
        lambda prompt, cache: kvjax.prefill(
            STEP, method, prompt, jnp.array(LENGTHS), cache, room=NEW, chunk=chunk
        )
    )(jnp.int32(tokens[:, :T]), table_decoder.empty(2))
    extend = quick_jit(
        lambda run, new: kvjax.extend(STEP, method, run, new, jnp.ones(2, jnp.int32))[0]
    )
    for t in range(NEW):
        new = tokens[[0, 1], [length + t for length in LENGTHS]]
        run = extend(run, jnp.int32(new[:, None]))
    for layer in range(table_decoder.LAYERS):
        protected, segment = run.cache.layers[layer].segments
        stored = segment.latent.dense()
        for row, length in enumerate(LENGTHS):
            mine = tokens[row, : length + NEW]
            sinks = _sinks(mine[:length], layer)
            for head in range(K):
                held = np.asarray(protected.pos[row, head])
                assert sorted(held[held >= 0]) == sinks.tolist()
            exact = TABLES.k[layer, mine[sinks]].swapaxes(0, 1)
            order = np.argsort(np.where(held < 0, 10**6, held))[: len(sinks)]
            np.testing.assert_allclose(
                np.asarray(protected.k[row])[:, order], table_decoder.turn(exact, sinks), atol=1e-5
            )
            rest = np.setdiff1d(np.arange(length + NEW), sinks)
            quantized = len(rest) // RESIDUAL * RESIDUAL
            pos = np.asarray(stored.pos[row, 0])
            order = np.argsort(np.where(pos < 0, 10**6, pos))[: len(rest)]
            assert pos[order].tolist() == rest.tolist()
            for got, want in zip((stored.k, stored.v), _coordinates(mine[rest], layer)):
                step = (want.max() - want.min()) / (2**bits - 1)
                want[:, :quantized] = quantizer(want[:, :quantized], bits, clip)
                got = np.asarray(got[row])[:, order]
                # Equal, but for a code in a thousand that sits on a tie and rounds the other way.
                off = np.abs(got - want) > 1e-4
                assert off.mean() < 2e-3 and np.abs(got - want).max() <= step
    # What is read: the coordinates rotated back, keys then turned to their positions.
    dense = segment.dense()
    row, rest = 1, rest[-1:]  # an exact token of the tail
    at = np.asarray(dense.pos[row, 0]).tolist().index(rest[0])
    np.testing.assert_allclose(dense.k[row, :, at], TABLES.k[layer, mine[rest[0]]], atol=1e-5)
    np.testing.assert_allclose(dense.v[row, :, at], TABLES.v[layer, mine[rest[0]]], atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_hadamard_basis_is_the_fast_transform_and_its_own_inverse(heads):
    rng = np.random.default_rng(heads)
    x, mean = jnp.float32(rng.normal(size=(2, 4, 5, 8))), jnp.float32(rng.normal(size=(4, 8)))
    basis = Hadamard.sorted_by(mean, heads)
    rotated = walsh_hadamard(np.asarray(x).swapaxes(1, 2).reshape(2, 5, 4 // heads, heads * 8)).reshape(2, 5, 32)
    order = np.argsort(walsh_hadamard(np.asarray(mean).reshape(-1, heads * 8)).ravel())
    want = rotated[..., order].reshape(2, 5, 4, 8).swapaxes(1, 2)
    np.testing.assert_allclose(basis.coordinates(x), want, atol=1e-5)
    np.testing.assert_allclose(basis.expand(basis.coordinates(x)), x, atol=1e-5)
    np.testing.assert_array_equal(Hadamard(heads=1).coordinates(x), Hadamard(heads=1).expand(x))


def test_rotation_spreads_an_outlier_channel():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 64))
    x[:, 7] += 30
    error = lambda x, y: np.sqrt(np.mean((x - y) ** 2))
    plain = error(x, quantizer(x, 2, 1.0))
    rotated = walsh_hadamard(x)
    assert error(rotated, quantizer(rotated, 2, 1.0)) < 0.75 * plain


def test_largest_inputs_are_those_of_a_sort_and_add_up_over_calls():
    x = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)
    x[0, 3, 2], x[0, 3, 4], x[1, 8, 0] = 50, -60, 1000
    pos = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, -1, -1]], np.int32)
    at_once = LargestInputs.of(jnp.asarray(x), jnp.asarray(pos), 5)
    for row, length in enumerate((9, 7)):
        order = np.argsort(-np.abs(x[row, :length]), axis=None)[:5]
        np.testing.assert_array_equal(at_once.pos[row], order // 6)
        # Entries keep fifteen bits, so that those of equal tokens are equal whatever the order of their sums.
        np.testing.assert_allclose(at_once.size[row], np.abs(x[row, :length]).ravel()[order], rtol=2**-15)
    assert at_once.pos[0].tolist()[:2] == [3, 3]
    parts = [LargestInputs.of(jnp.asarray(x[:, part]), jnp.asarray(pos[:, part]), 5) for part in (np.s_[:8], np.s_[8:])]
    for a, b in zip(parts[0].plus(parts[1]), at_once):
        np.testing.assert_array_equal(a, b)
    nothing = LargestInputs.of(jnp.asarray(x[:, :1]), jnp.full((2, 1), -1), 5)
    assert (nothing.pos == -1).all() and not nothing.size.any()
