"""The TPU kernels of the prefill (attention, mass, packing) in interpret mode, against their references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantize_pack import quantize_pack, words_in_row
from tests.pallas_kernels.attention_numpy import attention
from tests.pallas_kernels.kernel_tolerance import tolerance
from tests.quick_jit import quick_jit


def both(op, arrays, **static):
    """(kernel, reference). What the kernel never wrote would be NaN."""
    run = lambda implementation: quick_jit(functools.partial(op, implementation=implementation, **static))(*arrays)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        kernel = run("mosaic_tpu")
    return kernel, run("xla")


def close(got, want, dtype):
    np.testing.assert_allclose(got, want, **tolerance(jnp.dtype(dtype).name))


def _queries_and_slots(seed, dtype, B, T, K, G, H, S):
    """Slots in any order, an eighth of them empty; the last query of a row is padding."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, K * G, H))
    k = rng.normal(size=(B, K, S, H))
    k_pos = np.tile(np.arange(S), (B, K, 1))
    k_pos = rng.permuted(np.where(rng.random(k_pos.shape) < 0.125, -1, k_pos), axis=2)
    q_pos = np.sort(rng.integers(0, S + 1, size=(B, T)), axis=1)
    q_pos[0, T - 1 :] = -1
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.int32(q_pos), jnp.int32(k_pos)


# dtype, B, T, K, G, H, S, reduce, window, bias
MASS = {
    "two slots": (jnp.float32, 2, 2, 1, 1, 128, 2, "sum", None, False),
    "odd lengths": (jnp.float32, 2, 5, 2, 3, 64, 23, "entropy", 9, True),
    "sixteen heads to a group": (jnp.bfloat16, 1, 3, 1, 16, 256, 9, "squares", None, False),
    "tiles of queries and of slots": (jnp.float32, 1, 257, 1, 2, 64, 515, "max", None, True),
    "several blocks of heads": (jnp.bfloat16, 1, 9, 4, 4, 128, 40, "sum", 7, False),
}


@pytest.mark.parametrize("case", MASS)
def test_attention_mass(case):
    dtype, B, T, K, G, H, S, reduce, window, bias = MASS[case]
    q, k, q_pos, k_pos = _queries_and_slots(T, dtype, B, T, K, G, H, S)
    bias = jnp.float32(np.random.default_rng(0).normal(size=k_pos.shape)) if bias else None
    lse = jnp.float32(attention(q, k, k, q_pos, k_pos, bias=bias, window=window).lse)
    op = lambda q, k, q_pos, k_pos, lse, bias, **how: attention_mass(q, k, q_pos, k_pos, lse, bias=bias, **how)
    got, want = both(op, (q, k, q_pos, k_pos, lse, bias), reduce=reduce, window=window)
    close(got, want, dtype)
    assert want.max() > 0.01
    empty = np.repeat(np.asarray(k_pos) < 0, G, axis=1)
    np.testing.assert_array_equal(np.asarray(got)[empty], 0.0)


def test_hidden_slots_receive_nothing_whatever_their_logits():
    q, k, q_pos, k_pos = map(np.array, _queries_and_slots(0, jnp.float32, 2, 4, 1, 2, 64, 12))
    k[k_pos < 0] = 1e6
    lse = np.zeros(q.shape[:3], np.float32)
    q_pos[1], lse[1] = -1, -np.inf  # queries that saw nothing
    got, want = both(attention_mass, (q, k, q_pos, k_pos, lse))
    close(got, want, jnp.float32)
    assert want[0].max() > 0 and not got[1].any()


# dtype, lengths of the rows, T, K, G, H, window
PREFILL = {
    "one token": (jnp.float32, [1], 1, 1, 4, 128, None),
    "odd lengths": (jnp.float32, [13, 6, 0], 13, 2, 3, 64, None),
    "sixteen heads to a group": (jnp.bfloat16, [5, 0], 5, 1, 16, 256, None),
    "tiles of queries and of keys": (jnp.float32, [515], 515, 1, 1, 64, None),
    "a window skips tiles": (jnp.float32, [1030], 1030, 1, 1, 128, 300),
    "several blocks of heads": (jnp.bfloat16, [11, 3], 11, 4, 4, 128, 4),
}


@pytest.mark.parametrize("case", PREFILL)
def test_prefill_attention(case):
    dtype, lengths, T, K, G, H, window = PREFILL[case]
    rng = np.random.default_rng(T)
    q = rng.normal(size=(len(lengths), T, K * G, H))
    k, v = rng.normal(size=(2, len(lengths), K, T, H))
    # Positions start anywhere and may leave some out.
    pos = np.where(np.arange(T) < np.array(lengths)[:, None], 7 + np.arange(T) + np.arange(T) // 5, -1)
    arrays = (*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.int32(pos))
    got, want = both(prefill_attention, arrays, window=window)
    close(got.out, want.out, dtype)
    close(got.lse, want.lse, dtype)  # -inf where nothing is seen, in both
    assert not np.asarray(got.out)[pos < 0].any()


# dtype, scale dtype, S, H, bits, group, axis
PACKED = {
    "keys, 2 bits": (jnp.bfloat16, "bfloat16", 560, 128, 2, 16, "channel"),
    "keys, 4 bits": (jnp.float32, "float32", 32, 64, 4, 8, "channel"),
    "keys, 2 bits of 64 channels": (jnp.bfloat16, "bfloat16", 1152, 64, 2, 32, "channel"),
    "values, 8 bits of 64 channels": (jnp.bfloat16, "bfloat16", 40, 64, 8, 32, "token"),
    "values, one scale a token": (jnp.bfloat16, "bfloat16", 40, 256, 4, 256, "token"),
    "values, 8 bits": (jnp.float32, "float32", 4, 128, 8, 64, "token"),
}


@pytest.mark.parametrize("case", PACKED)
def test_quantize_pack_is_bit_exact(case):
    dtype, scale_dtype, S, H, bits, group, axis = PACKED[case]
    rng = np.random.default_rng(S)
    x = jnp.asarray(rng.normal(size=(1, 2, S, H)) * 10.0 ** rng.integers(-3, 3, size=(1, 2, S, 1)), dtype)
    valid = rng.random((1, 2, S)) < 0.8
    valid[0, 0, : S // 2] = False
    how = dict(bits=bits, group=group, axis=axis, scale_dtype=scale_dtype, in_row=words_in_row(H, S * bits // 32))
    got, want = both(quantize_pack, (x, jnp.asarray(valid)), **how)
    for a, b in zip(*map(jax.tree.leaves, (got, want))):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_quantize_pack_clips_as_the_reference_does():
    x = jnp.float32(np.random.default_rng(0).normal(size=(1, 1, 32, 64)))
    how = dict(bits=4, group=32, axis="channel", scale_dtype="float32", clip=0.8)
    got, want = both(quantize_pack, (x, jnp.ones(x.shape[:3], bool)), **how)
    # The ends are moved by a product and a sum, which a compiler may round once or twice.
    (scale, zero), (want_scale, want_zero) = got.scale_and_zero(), want.scale_and_zero()
    np.testing.assert_allclose(zero, want_zero, rtol=3e-7)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-6)


def test_refusals_name_the_shape():
    q, k, q_pos, k_pos = _queries_and_slots(0, jnp.float32, 1, 2, 1, 1, 64, 4)
    lse, valid = jnp.zeros(q.shape[:3]), k_pos >= 0
    mass = functools.partial(attention_mass, implementation="mosaic_tpu")
    prefill = functools.partial(prefill_attention, implementation="mosaic_tpu")
    pack = functools.partial(quantize_pack, bits=8, scale_dtype="float32", implementation="mosaic_tpu")
    wide = jnp.zeros((1, 1, 4096, 64))
    k = k[:, :, :2]
    for message, refused in {
        "attention_mass: mosaic_tpu takes heads of 64, 128 or 256, got 40": lambda: mass(
            q[..., :40], k[..., :40], q_pos, k_pos[..., :2], lse
        ),
        "attention_mass: mosaic_tpu takes float32 and bfloat16, got q float32 and k float8_e4m3fn": lambda: mass(
            q, k.astype(jnp.float8_e4m3fn), q_pos, k_pos[..., :2], lse
        ),
        "attention_mass: mosaic_tpu takes at least one query and two slots": lambda: mass(
            q, k[:, :, :1], q_pos, k_pos[..., :1], lse
        ),
        "prefill_attention: mosaic_tpu takes heads of 64, 128 or 256 in q, k and v alike, got 64 and 40": lambda: (
            prefill(q, k, k[..., :40], q_pos)
        ),
        "prefill_attention: mosaic_tpu takes q, k and v all float32 or all bfloat16": lambda: prefill(
            q, k, k.astype(jnp.bfloat16), q_pos
        ),
        "quantize_pack: mosaic_tpu takes groups of a multiple of 8, got 4": lambda: pack(
            jnp.zeros((1, 1, 4, 64)), valid, group=4, axis="channel"
        ),
        "quantize_pack: mosaic_tpu holds 4096 slots of 128 channels": lambda: pack(
            jnp.zeros((1, 1, 4096, 128)), jnp.ones(wide.shape[:3], bool), group=2048, axis="channel"
        ),
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            refused()
