"""`decode_attention` of codes equals that of their centroids, and the lookup tables of MILLION."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import api as op
from pallas_kernels.product_quantize import api as pq
from tests.pallas_kernels.attention_numpy import attention
from tests.pallas_kernels.test_product_quantize import nearest
from tests.quick_jit import quick_jit

# float32 against float64: products of 8 terms, a few hundred slots.
CLOSE = dict(rtol=3e-5, atol=3e-5)
TILE = 512
B, T, K, G, H = 2, 2, 2, 2, 8

decode_attention = quick_jit(op.decode_attention, static_argnames=("window", "scale"))


def _draw(seed: int, S: int, key_shape=(4, 16, 2), value_shape=(2, 64, 4)):
    rng = np.random.default_rng(seed)
    q = jnp.float32(rng.normal(size=(B, T, K * G, H)))
    k, v = rng.normal(size=(2, B, K, S, H)).astype(np.float32)
    books = [jnp.float32(rng.normal(size=shape)) for shape in (key_shape, value_shape)]
    k_pos = np.tile(np.arange(S), (B, K, 1))
    k_pos = np.int32(rng.permuted(np.where(rng.random(k_pos.shape) < 0.125, -1, k_pos), axis=2))
    q_pos = np.int32(np.sort(rng.integers(S // 2, S + 1, size=(B, T)), axis=1))
    return q, k, v, *books, q_pos, k_pos


def _codes(k, v, key_book, value_book, k_pos):
    return pq.product_quantize(k, k_pos >= 0, key_book), pq.product_quantize(v, k_pos >= 0, value_book)


@pytest.mark.parametrize("S", [16, TILE + 16, 3 * TILE + 48])
@pytest.mark.parametrize("how", [{}, dict(window=11, scale=0.3)])
def test_attention_over_centroids(S, how):
    q, k, v, *books, q_pos, k_pos = _draw(S, S)
    codes = _codes(k, v, *books, k_pos)
    got = decode_attention(q, *codes, q_pos, k_pos, **how)
    want = attention(q, *(x.decode() for x in codes), q_pos, k_pos, **how)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, want.out, **CLOSE)
    np.testing.assert_allclose(got.lse, want.lse, **CLOSE)


def test_the_papers_lookup_tables():
    q, k, v, key_book, value_book, q_pos, k_pos = _draw(0, 32)
    got = decode_attention(q, *_codes(k, v, key_book, value_book, k_pos), q_pos, k_pos)
    key_codes, value_codes = nearest(k, key_book), nearest(v, value_book)
    key_book, value_book = (np.asarray(book, np.float64) for book in (key_book, value_book))
    for b in range(B):
        for n in range(K * G):
            head = n // G
            for t in range(T):
                table = np.einsum("md,mcd->mc", np.asarray(q, np.float64)[b, t, n].reshape(4, 2), key_book)
                logit = np.array([table[np.arange(4), code].sum() for code in key_codes[b, head]]) / np.sqrt(H)
                seen = (k_pos[b, head] >= 0) & (k_pos[b, head] <= q_pos[b, t])
                p = np.where(seen, np.exp(logit), 0)
                by_code = np.zeros((2, 64))  # probabilities added up by code, then one product with the codebook
                for weight, code in zip(p / p.sum(), value_codes[b, head]):
                    by_code[np.arange(2), code] += weight
                out = np.einsum("mc,mcd->md", by_code, value_book).ravel()
                np.testing.assert_allclose(got.out[b, t, n], out, **CLOSE)
                np.testing.assert_allclose(got.lse[b, t, n], np.log(p.sum()), **CLOSE)


@pytest.mark.parametrize("S", [0, 16])
def test_empty_slots_make_an_empty_part(S):
    q, k, v, *books, q_pos, k_pos = _draw(4, 16)
    codes = (x.cut(0, S) for x in _codes(k, v, *books, k_pos))
    part = decode_attention(q, *codes, q_pos, np.full((B, K, S), -1, np.int32))
    assert not part.out.any() and (part.lse == -jnp.inf).all()
