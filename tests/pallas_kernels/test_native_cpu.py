"""`decode_attention` in C++ against NumPy, for every instruction set that this machine has."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import Rotation, decode_attention, native_cpu, reference
from pallas_kernels.quantize_pack import quantize_pack
from tests.pallas_kernels.attention_numpy import attention

CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32 against float64
VERSIONS = ("avx512", "avx2", "portable")
built = pytest.mark.skipif(not native_cpu.is_built(), reason="built only where there is a C++ compiler")


def _codes(bits, axis, group, dtype="bfloat16", in_row=1):
    how = dict(bits=bits, axis=axis, group=group, scale_dtype=dtype, in_row=in_row)
    return lambda x: quantize_pack(x, jnp.ones(x.shape[:3], bool), **how)


KINDS = {
    "float32": lambda x: x,
    "bfloat16": lambda x: x.astype(jnp.bfloat16),
    "int8 over tokens": _codes(8, "channel", 16),
    "int4 over tokens, two words in a row": _codes(4, "channel", 32, in_row=2),
    "int2 over tokens, scales in float32": _codes(2, "channel", 16, "float32"),
    "int8 over channels": _codes(8, "token", 16),
    "int4 over channels, all of them": _codes(4, "token", 64),
    "int2 over channels": _codes(2, "token", 8, "float32"),
}


def _numbers(x):
    return np.asarray(x.decode() if hasattr(x, "decode") else x, np.float64)


def _drawn(B=2, T=1, K=2, G=3, S=160, H=64, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.float32(rng.normal(size=s)) for s in ((B, T, K * G, H), (B, K, S, H), (B, K, S, H)))
    pos = rng.permuted(np.broadcast_to(np.arange(S) - 20, (B, K, S)), axis=-1)  # 20 are empty
    return q, k, v, jnp.int32(rng.integers(S // 2, S, size=(B, T))), jnp.int32(np.maximum(pos, -1)), rng


@functools.partial(jax.jit, static_argnames=("window", "scale", "version"))
def _attend(q, k, v, q_pos, k_pos, **how):
    return native_cpu.attend(q, k, v, q_pos, k_pos, **how)


def _versions():
    for version in VERSIONS:
        try:
            jax.block_until_ready(_attend(*_drawn()[:5], version=version))
        except jax.errors.JaxRuntimeError as error:  # says so, and never falls back
            assert f"no version {version}" in str(error)
        else:
            yield version


@built
@pytest.mark.parametrize("keys, values", [(kind, kind) for kind in KINDS] + [("int8 over tokens", "float32")])
def test_every_representation_is_read_as_what_it_means(keys, values):
    q, k, v, q_pos, k_pos, _ = _drawn()
    k, v = KINDS[keys](k), KINDS[values](v)
    want = attention(q, _numbers(k), _numbers(v), q_pos, k_pos)
    for version in _versions():
        got = _attend(q, k, v, q_pos, k_pos, version=version)
        np.testing.assert_allclose(got.out, want.out, **CLOSE)
        np.testing.assert_allclose(got.lse, want.lse, **CLOSE)


@built
@pytest.mark.parametrize(
    "shape",
    [
        dict(H=48, G=1, S=33),  # no whole registers, a last tile that is short
        dict(H=128, K=1, G=4, S=1100),  # several pieces
        dict(H=20, T=4, G=2, S=40),
        dict(H=64, T=5, G=4, S=2048 + 7, B=1),
    ],
)
@pytest.mark.parametrize("window", [None, 30])
def test_gains_biases_windows_and_padding_in_any_shape(shape, window):
    q, k, v, q_pos, k_pos, rng = _drawn(**shape)
    q_pos = q_pos.at[0, 0].set(-1)  # padding sees nothing
    bias, k_gain, v_gain = (jnp.float32(rng.normal(size=k_pos.shape)) for _ in range(3))
    gain = lambda x, by: np.asarray(x, np.float64) * np.asarray(by)[..., None]
    how = dict(bias=bias, window=window, scale=0.3)
    want = attention(q, gain(k, k_gain), gain(v, v_gain), q_pos, k_pos, **how)
    for version in _versions():
        got = _attend(q, k, v, q_pos, k_pos, k_gain=k_gain, v_gain=v_gain, version=version, **how)
        np.testing.assert_allclose(got.out, want.out, **CLOSE)
        np.testing.assert_allclose(got.lse, want.lse, **CLOSE)
    assert np.isneginf(got.lse[0, 0]).all() and not np.asarray(got.out)[0, 0].any()


@built
def test_shared_heads_and_keys_that_are_the_values():
    q, k, _, q_pos, k_pos, _ = _drawn(K=1, G=6)
    got = _attend(q, k, None, q_pos, k_pos)
    want = attention(q, k, k, q_pos, k_pos)
    np.testing.assert_allclose(got.out, want.out, **CLOSE)
    positions = jnp.concatenate([k_pos, jnp.roll(k_pos, 3, axis=-1)], axis=1)  # of two heads, over the same keys
    got = _attend(q, k, None, q_pos, positions)
    want = attention(q, *2 * [jnp.repeat(k, 2, axis=1)], q_pos, positions)
    np.testing.assert_allclose(got.out, want.out, **CLOSE)


@built
def test_what_empty_slots_hold_is_not_read():
    q, k, v, q_pos, k_pos, _ = _drawn()
    empty = (k_pos < 0)[..., None]
    got = _attend(q, jnp.where(empty, 1e38, k), jnp.where(empty, 1e38, v), q_pos, k_pos)
    np.testing.assert_array_equal(got.out, _attend(q, k, v, q_pos, k_pos).out)


@built
def test_a_row_does_not_depend_on_its_neighbours():
    q, k, v, q_pos, k_pos, _ = _drawn(B=3, S=3000)
    whole = _attend(q, k, v, q_pos, k_pos)
    for b in range(3):
        row = _attend(*(x[b : b + 1] for x in (q, k, v, q_pos, k_pos)))
        np.testing.assert_array_equal(whole.out[b], row.out[0])
        np.testing.assert_array_equal(whole.lse[b], row.lse[0])


@built
def test_it_is_the_default_on_cpu_where_it_takes_what_is_asked():
    q, k, v, q_pos, k_pos, _ = _drawn()
    text = lambda *more, **how: jax.jit(decode_attention).lower(q, k, v, q_pos, k_pos, *more, **how).as_text()
    assert "kvjax_decode_attention" in text()
    assert "kvjax_decode_attention" not in text(rotation=Rotation(jnp.ones(32)))
    with pytest.raises(NotImplementedError, match="native_cpu takes queries in float32, got bfloat16"):
        decode_attention(q.astype(jnp.bfloat16), k, v, q_pos, k_pos, implementation="native_cpu")
    with pytest.raises(NotImplementedError, match="up to 32 queries a KV head, got T . G = 33"):
        decode_attention(jnp.tile(q, (1, 11, 1, 1)), k, v, jnp.tile(q_pos, (1, 11)), k_pos, implementation="native_cpu")


@built
def test_its_gradient_is_that_of_the_reference():
    q, k, v, q_pos, k_pos, _ = _drawn(S=40)
    loss = lambda attend: jax.jit(jax.grad(lambda q: jnp.sum(jnp.square(attend(q, k, v, q_pos, k_pos).out))))(q)
    np.testing.assert_allclose(loss(decode_attention), loss(reference.decode_attention), **CLOSE)


def test_without_it_xla_computes_and_the_log_says_so(monkeypatch, caplog):
    native_cpu.is_built.cache_clear()
    monkeypatch.setattr(native_cpu.importlib.machinery, "EXTENSION_SUFFIXES", [])
    arrays = _drawn()[:5]
    try:
        with caplog.at_level(logging.WARNING):
            text = jax.jit(lambda *x: decode_attention(*x)).lower(*arrays).as_text()
    finally:
        native_cpu.is_built.cache_clear()
    assert "kvjax_decode_attention" not in text
    assert [r.message for r in caplog.records] == [
        "decode_attention: the extension for CPU is not built (no C++ compiler?); XLA computes it."
    ]
