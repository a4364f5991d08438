"""`decode_attention` of packed keys and values equals that of what their codes stand for, however many tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize_pack import words_in_row
from pallas_kernels.quantize_pack import api as packing
from pallas_kernels.decode_attention import api as op
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

# float32: codes are affinely restored (one rounding each), then products of 16 terms and tiles merged.
FLOAT32 = dict(rtol=3e-5, atol=3e-5)
TILE = 512

decode_attention = quick_jit(op.decode_attention, static_argnames=("window", "scale"))

# One program of many operations compiles in a fraction of the time.
quantize_pack = quick_jit(packing.quantize_pack, static_argnames=("bits", "group", "axis", "scale_dtype", "in_row"))
decode = quick_jit(lambda packed: packed.decode())


def _draw(seed, S, bits, B=1, T=2, K=2, G=2, H=16, group=16, key_axis="channel"):
    rng = np.random.default_rng(seed)
    q = jnp.float32(rng.normal(size=(B, T, K * G, H)))
    k, v = jnp.float32(rng.normal(size=(2, B, K, S, H)))
    k_pos = np.tile(np.arange(S), (B, K, 1))
    k_pos = jnp.int32(rng.permuted(np.where(rng.random(k_pos.shape) < 0.125, -1, k_pos), axis=2))
    q_pos = jnp.int32(np.sort(rng.integers(S // 2, S + 1, size=(B, T)), axis=1))
    how = dict(bits=bits, group=group, scale_dtype="bfloat16", in_row=words_in_row(H, S * bits // 32))
    k = quantize_pack(k, k_pos >= 0, axis=key_axis, **how)
    v = quantize_pack(v, k_pos >= 0, axis="token", **how)
    return q, k, v, q_pos, k_pos


def _check(args, tolerance=FLOAT32, **how):
    q, k, v, q_pos, k_pos = args
    got = decode_attention(q, k, v, q_pos, k_pos, **how)
    want = attention(q, decode(k), decode(v), q_pos, k_pos, **how)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, want.out, **tolerance)
    np.testing.assert_allclose(got.lse, want.lse, **tolerance)


@pytest.mark.parametrize("S", [16, TILE, TILE + 16, 3 * TILE, 3 * TILE + 48])
def test_tile_counts(S):
    _check(_draw(S, S, 4))


@pytest.mark.parametrize("bits", [2, 8])
def test_bits(bits):
    _check(_draw(bits, TILE + 32, bits))


@pytest.mark.parametrize("S", [16, TILE + 16, 2 * TILE + 48])
def test_keys_quantized_per_token(S):
    _check(_draw(S, S, 2, group=8, key_axis="token"))


def test_groups_that_do_not_fill_words_in_a_tile():
    _check(_draw(6, 48 * 12, 2, group=24, H=48))


def test_groups_that_do_not_divide_a_tile():
    _check(_draw(0, 96 * 12, 4, group=96, H=96))


def test_a_group_larger_than_a_tile():
    _check(_draw(1, 1280, 4, group=640, H=640, K=1, G=1))


def test_rows_and_groups_of_heads():
    _check(_draw(2, 64, 4, B=3, T=1, G=4))


def test_window_and_scale():
    _check(_draw(3, TILE + 32, 4), window=100, scale=0.1)


@pytest.mark.parametrize("S", [0, 16])
def test_empty_slots_make_an_empty_part(S):
    q, k, v, q_pos, k_pos = _draw(4, max(S, 16), 4)
    if S == 0:
        k, v = k.cut(0, 0), v.cut(0, 0)
        k_pos = k_pos[:, :, :0]
    part = decode_attention(q, k, v, q_pos, jnp.full_like(k_pos, -1))
    assert not part.out.any()
    assert (part.lse == -jnp.inf).all()


def test_bfloat16_queries():
    q, k, v, q_pos, k_pos = _draw(5, 64, 8)
    # Restored keys and values, the scaled queries and the probabilities are rounded to 8 bits.
    _check((q.astype(jnp.bfloat16), k, v, q_pos, k_pos), dict(rtol=3e-2, atol=3e-2))
