"""`product_quantize`: nearest centroids by NumPy, the bit layout by hand, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.product_quantize import api
from pallas_kernels.words import unpack
from tests.quick_jit import quick_jit

product_quantize = quick_jit(api.product_quantize)
decode = quick_jit(lambda codes: codes.decode())


def _codebook(seed: int, parts: int, centroids: int, width: int, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(parts, centroids, width)), dtype)


def nearest(x, codebook) -> np.ndarray:
    """Indices of the nearest centroids, [B, K, S, M], in float64."""
    codebook = np.asarray(codebook).astype(np.float64)
    M, _, width = codebook.shape
    parts = np.asarray(x, np.float64).reshape(*x.shape[:3], M, 1, width)
    return np.argmin(((parts - codebook) ** 2).sum(axis=-1), axis=-1)


def test_codes_and_words_by_hand():
    # Two sub-vectors of one channel; centroids 0 1 2 3 for the first, 3 2 1 0 for the second.
    codebook = jnp.float32([[0, 1, 2, 3], [3, 2, 1, 0]])[..., None]
    values = np.tile([0.2, 0.9, 2.4, 7.0], 4)
    x = jnp.float32(np.stack([values, values], axis=-1)).reshape(1, 1, 16, 2)
    codes = product_quantize(x, jnp.ones((1, 1, 16), bool), codebook)
    (words,) = codes.planes
    assert words.shape == (1, 1, 1, 2) and words.dtype == jnp.uint32
    assert words.ravel().tolist() == [0xE4E4E4E4, 0x1B1B1B1B]  # 0 1 2 3 and 3 2 1 0, low bits first
    np.testing.assert_array_equal(decode(codes)[0, 0, :4], [[0, 0], [1, 1], [2, 2], [3, 3]])


@pytest.mark.parametrize("bits, planes", [(4, (4,)), (6, (4, 2)), (8, (8,)), (10, (8, 2))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_sub_vector_becomes_its_nearest_centroid(bits, planes, dtype):
    rng = np.random.default_rng(bits)
    codebook = _codebook(bits, 3, 2**bits, 2, dtype)
    x = rng.normal(size=(2, 2, 48, 6)).astype(np.float32)
    valid = rng.random((2, 2, 48)) < 0.8
    codes = product_quantize(x, valid, codebook)
    assert [words.nbytes for words in codes.planes] == [2 * 2 * 48 * 3 * plane // 8 for plane in planes]
    got, shift = 0, 0
    for words, plane in zip(codes.planes, planes, strict=True):
        got, shift = got + (np.asarray(unpack(words, plane)).astype(int) << shift), shift + plane
    want = np.where(valid[..., None], nearest(x, codebook), 0)
    np.testing.assert_array_equal(got, want)  # random numbers have no ties
    centroids = np.asarray(codebook).astype(np.float32)
    expected = centroids[np.arange(3), want].reshape(2, 2, 48, 6)
    np.testing.assert_array_equal(decode(codes), expected)


def test_ties_go_to_the_lower_code():
    codebook = jnp.float32([[1, -1, 1, -1]])[..., None]
    (words,) = product_quantize(jnp.zeros((1, 1, 16, 1)), jnp.ones((1, 1, 16), bool), codebook).planes
    assert not words.any()


REFUSED = {
    "channels": (_codebook(0, 3, 4, 2), 16, "codebook must cover 8 channels, got 3 sub-vectors of 2"),
    "centroids": (_codebook(0, 4, 5, 2), 16, "codebook must have 4, 16, 64, ... or 16384 centroids, got 5"),
    "odd bits": (_codebook(0, 4, 8, 2), 16, "codebook must have 4, 16, .* got 8"),
    "slots": (_codebook(0, 4, 16, 2), 12, "slots must be a multiple of 8 for codes of 4 bits, got 12"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_codebooks_are_refused_by_name(case):
    codebook, slots, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        api.product_quantize(jnp.zeros((1, 1, slots, 8)), jnp.ones((1, 1, slots), bool), codebook)
