"""`quantize_pack`: the bit layout by hand, the error bound for any input, and KIVI's own quantizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantize_pack import api, words_in_row
from pallas_kernels.words import pack, unpack, unpack_planes
from tests.pallas_kernels.kivi_numpy import kivi_quantizer
from tests.quick_jit import quick_jit

_STATIC = ("bits", "group", "axis", "scale_dtype", "clip", "in_row")
# One program a shape compiles faster than its operations one by one.
quantize_pack = quick_jit(api.quantize_pack, static_argnames=_STATIC)
decode = quick_jit(lambda packed: packed.decode())
BITS = (2, 3, 4, 8)
DTYPES = ("float32", "bfloat16")


def _everywhere(scale, axis, group, S, H):
    """Scales (or zeros) of every entry: [B, K, S, H] in float64."""
    scale = np.asarray(scale).astype(np.float64)
    if axis == "channel":
        return np.repeat(scale, group, axis=2)
    return np.repeat(scale.swapaxes(2, 3), group, axis=3)


# --- the layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits, codes, word",
    [
        (8, [0x11, 0x22, 0x33, 0xFF], 0xFF332211),
        (4, [1, 2, 3, 4, 5, 6, 7, 15], 0xF7654321),
        (2, [3, 0, 1, 2] * 4, 0b10_01_00_11_10_01_00_11_10_01_00_11_10_01_00_11),
    ],
)
def test_slots_fill_a_word_from_its_low_bits(bits, codes, word):
    codes = jnp.array(codes, jnp.uint32).reshape(1, 1, -1, 1)
    words = pack(codes, bits)
    assert words.shape == (1, 1, 1, 1) and words.dtype == jnp.uint32
    assert int(words[0, 0, 0, 0]) == word
    np.testing.assert_array_equal(unpack(words, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpack_inverts_pack(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, size=(2, 3, 96, 5)).astype(np.uint32)
    words = pack(jnp.asarray(codes), bits)
    assert words.shape == (2, 3, 96 * bits // 32, 5)
    np.testing.assert_array_equal(unpack(words, bits), codes)


def test_keys_by_hand():
    # Channel 0 runs 0, 1, 2, 3 in each group of four tokens: 2 bits, scale 1, zero 0, codes 0 1 2 3.
    # Channel 1 is twice that minus 1: scale 2, zero -1, the same codes.
    ramp = np.tile(np.arange(4.0), 4)
    x = jnp.float32(np.stack([ramp, 2 * ramp - 1], axis=-1)).reshape(1, 1, 16, 2)
    packed = quantize_pack(x, jnp.ones((1, 1, 16), bool), bits=2, group=4, axis="channel", scale_dtype="float32")
    # Scales are rounded up by at most one part in 2 ** 23 per step.
    np.testing.assert_allclose(packed.affine[0, 0], [[1.0, 2.0, 0.0, -1.0]] * 4, rtol=5e-7)
    np.testing.assert_array_equal(packed.words.ravel(), [0xE4E4E4E4, 0xE4E4E4E4])


def test_values_by_hand():
    # Every token's four channels are 0, 1, 2, 3 plus the token's number: one scale a token.
    x = jnp.float32(np.arange(16)[:, None] + np.arange(4.0)).reshape(1, 1, 16, 4)
    packed = quantize_pack(x, jnp.ones((1, 1, 16), bool), bits=2, group=4, axis="token", scale_dtype="float32")
    assert packed.affine.shape == (1, 1, 2, 16)
    scale, zero = packed.affine[0, 0]
    np.testing.assert_allclose(zero, np.arange(16.0), rtol=5e-7)
    np.testing.assert_allclose(scale, 1.0, rtol=3e-6)  # zero 15 rounded down by one last place
    np.testing.assert_array_equal(unpack(packed.words, 2)[0, 0], np.tile(np.arange(4), (16, 1)))


def test_words_side_by_side():
    # Of three channels: the first row of two words, then what follows it in slots.
    x = np.random.default_rng(0).normal(size=(2, 1, 64, 3)).astype(np.float32)
    how = dict(bits=4, group=8, axis="channel", scale_dtype="float32")
    one, two = (quantize_pack(x, np.ones((2, 1, 64), bool), in_row=n, **how) for n in (1, 2))
    assert one.words.shape == (2, 1, 8, 3) and two.words.shape == (2, 1, 4, 6)
    np.testing.assert_array_equal(two.words[..., :3], one.words[:, :, ::2])
    np.testing.assert_array_equal(two.words[..., 3:], one.words[:, :, 1::2])
    np.testing.assert_array_equal(one.affine, two.affine)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("slots", [0, 64])
def test_words_in_a_row_are_restored_in_their_order(axis, slots):
    x = np.random.default_rng(0).normal(size=(2, 1, slots, 16)).astype(np.float32)
    how = dict(bits=4, group=8, axis=axis, scale_dtype="float32")
    restored = [
        decode(quantize_pack(x, np.ones((2, 1, slots), bool), in_row=n, **how)) for n in (1, 4)
    ]
    assert restored[0].shape == x.shape
    np.testing.assert_array_equal(*restored)


def test_as_many_words_as_fill_the_lanes_and_a_piece_has():
    assert [words_in_row(channels, 8) for channels in (16, 32, 64, 128, 256, 96, 40)] == [8, 4, 2, 1, 1, 1, 1]
    assert [words_in_row(64, words) for words in (1, 2, 3, 4)] == [1, 2, 1, 2]


# --- the error bound ----------------------------------------------------------------------------------------------

S, H, GROUP = 32, 8, 4


@st.composite
def _arrays(draw):
    """[1, 2, S, H] float32: noise, constants, zeros, and offsets far larger than the spread."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(1, 2, S, H))
    x *= 10.0 ** rng.integers(-4, 5, size=(1, 2, S // GROUP, H // GROUP)).repeat(GROUP, 2).repeat(GROUP, 3)
    kind = rng.integers(0, 5, size=(1, 2, S // GROUP, H // GROUP)).repeat(GROUP, 2).repeat(GROUP, 3)
    x = np.where(kind == 1, 0.0, x)
    x = np.where(kind == 2, 3.7, x)
    x = np.where(kind == 3, x + 1e6, x)
    x = np.where(kind == 4, -np.abs(x), x)
    valid = rng.random((1, 2, S)) < draw(st.sampled_from([1.0, 0.7, 0.1]))
    return x.astype(np.float32), valid


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(array=_arrays())
def test_the_error_is_at_most_half_a_scale(array, bits, axis, scale_dtype):
    x, valid = array
    packed = quantize_pack(x, valid, bits=bits, group=GROUP, axis=axis, scale_dtype=scale_dtype)
    assert packed.affine.dtype == jnp.dtype(scale_dtype)
    scale, zero = (_everywhere(x, axis, GROUP, S, H) for x in packed.scale_and_zero())
    codes = np.asarray(unpack_planes(packed.planes, bits, H)).astype(np.float64)
    assert (scale > 0).all() and codes.max() < 2**bits
    np.testing.assert_array_equal(codes[~valid], 0)
    # Of the exact affine value: half a step. What float32 adds is one last place of the largest number: in the
    # difference x - zero, in its quotient, in the product, in the sum.
    slack = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(x), np.abs(zero))
    assert (np.abs(x - (codes * scale + zero))[valid] <= (scale / 2 + slack)[valid]).all()
    restored = np.asarray(decode(packed)).astype(np.float64)
    assert (np.abs(x - restored)[valid] <= (scale / 2 + 2 * slack)[valid]).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_constant_and_zero_groups_survive(axis, scale_dtype):
    valid = jnp.ones((1, 1, S), bool)
    how = dict(bits=2, group=GROUP, axis=axis, scale_dtype=scale_dtype)
    zeros = quantize_pack(jnp.zeros((1, 1, S, H)), valid, **how)
    np.testing.assert_array_equal(decode(zeros), 0.0)
    constant = quantize_pack(jnp.full((1, 1, S, H), 2.5), valid, **how)
    # A constant costs nothing but the rounding of zero: within one last place of scale_dtype.
    error = jnp.abs(decode(constant) - 2.5)
    assert error.max() <= 2.5 * float(jnp.finfo(scale_dtype).eps)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_empty_slots_do_not_touch_the_extremes(axis):
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(1, 1, S, H)))
    valid = jnp.asarray(rng.random((1, 1, S)) < 0.6)
    how = dict(bits=4, group=GROUP, axis=axis, scale_dtype="float32")
    quiet = quantize_pack(x, valid, **how)
    loud = quantize_pack(jnp.where(valid[..., None], x, 1e9), valid, **how)
    for a, b in zip(*map(jax.tree.leaves, (quiet, loud))):
        np.testing.assert_array_equal(a, b)
    nobody = quantize_pack(x, jnp.zeros_like(valid), **how)
    _, zero = nobody.scale_and_zero()
    assert not nobody.words.any() and jnp.isfinite(nobody.affine).all() and not zero.any()


def test_bfloat16_input_is_quantized_as_its_float32_value():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, S, H)), jnp.bfloat16)
    valid = jnp.ones((1, 1, S), bool)
    how = dict(bits=4, group=GROUP, axis="channel", scale_dtype="bfloat16")
    found = (jax.tree.leaves(quantize_pack(y, valid, **how)) for y in (x, x.astype(jnp.float32)))
    for a, b in zip(*found):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", BITS)
def test_physical_bytes(axis, bits):
    packed = quantize_pack(
        jnp.zeros((2, 3, S, H)), jnp.ones((2, 3, S), bool), bits=bits, group=GROUP, axis=axis, scale_dtype="bfloat16"
    )
    assert sum(x.nbytes for x in packed.planes) == 2 * 3 * S * H * bits // 8
    assert packed.affine.nbytes == 2 * 2 * 3 * S * H // GROUP * 2


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_clipping_cuts_both_ends_of_the_range(axis):
    # 10, 11, 12, 13 with 0.8 of the range: 10.3 to 12.7 in three steps.
    ramp = np.tile(np.arange(4.0) + 10, 4)
    x = ramp[:, None] + np.zeros(4) if axis == "channel" else np.arange(4.0) + 10 + np.zeros((16, 1))
    how = dict(bits=2, group=4, axis=axis, scale_dtype="float32")
    packed = quantize_pack(jnp.float32(x).reshape(1, 1, 16, 4), jnp.ones((1, 1, 16), bool), clip=0.8, **how)
    scale, zero = packed.scale_and_zero()
    np.testing.assert_allclose(zero, 10.3, rtol=1e-6)
    np.testing.assert_allclose(scale, 0.8, rtol=1e-5)
    want = 10.3 + 0.8 * (x - 10)
    np.testing.assert_allclose(decode(packed)[0, 0], want, rtol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------------

REFUSED = {
    "bits": (dict(bits=5), "bits must be 2, 3, 4 or 8, got 5"),
    "words": (dict(bits=2, slots=24), "slots must be a multiple of 16 for 2-bit words, got 24"),
    "tokens": (dict(group=12), "group must divide the channel group axis of length 32, got 12"),
    "row": (dict(in_row=3), "in_row must divide the 4 words of a channel, got 3"),
    "clip": (dict(clip=0.0), r"clip must be in \(0, 1\], got 0.0"),
    "channels": (dict(group=3, axis="token"), "group must divide the token group axis of length 8, got 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_layouts_are_refused_by_name(case):
    changed, message = REFUSED[case]
    how = dict(bits=4, group=GROUP, axis="channel", scale_dtype="float32") | changed
    slots = how.pop("slots", S)
    with pytest.raises(ValueError, match=message):
        api.quantize_pack(jnp.zeros((1, 1, slots, H)), jnp.ones((1, 1, slots), bool), **how)


# --- KIVI ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis, numpy_axis", [("channel", 2), ("token", 3)])
def test_kivis_quantizer(bits, axis, numpy_axis):
    rng = np.random.default_rng(bits)
    # Outlier channels, as in keys.
    x = (rng.normal(size=(2, 2, 128, 64)) * np.where(rng.random(64) < 0.1, 20, 1)).astype(np.float32)
    packed = quantize_pack(x, np.ones((2, 2, 128), bool), bits=bits, group=32, axis=axis, scale_dtype="float32")
    codes = np.asarray(unpack_planes(packed.planes, bits, 64))
    exact, restored = kivi_quantizer(x, bits, 32, numpy_axis)
    # Scales are rounded outwards by parts of 1e-7: only codes that close to a tie may differ.
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    assert tie.mean() < 1e-2
    np.testing.assert_array_equal(codes[~tie], np.rint(exact)[~tie])
    got = np.asarray(decode(packed))
    # zero and scale are rounded outwards by up to two parts in 1e7 of numbers near 60.
    np.testing.assert_allclose(got[~tie], restored[~tie], rtol=1e-5, atol=5e-5)


def test_bfloat16_scales_cost_kivi_little():
    x = np.random.default_rng(0).normal(size=(1, 2, 128, 64)).astype(np.float32)
    error = functools.partial(_rms_error, x, bits=2, group=32, axis="channel")
    # zero and scale move by up to 2 ** -8 of a range that is three steps wide.
    assert error(scale_dtype="bfloat16") < 1.02 * error(scale_dtype="float32")


def _rms_error(x, **how):
    packed = quantize_pack(x, np.ones(x.shape[:3], bool), **how)
    restored = decode(packed)
    return float(np.sqrt(np.mean((np.asarray(restored) - x) ** 2)))
