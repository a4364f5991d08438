"""The TPU kernel of `decode_attention`, interpreted, against the reference."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_decode_blocks
from pallas_kernels.decode_attention import api, mosaic_tpu
from pallas_kernels.partial import Partial
from pallas_kernels.shapes import CHECKED, DecodeShape
from tests.pallas_kernels.kernel_tolerance import tolerance
from tests.quick_jit import quick_jit


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Of the few slots that an interpreted kernel reads in time."""
    monkeypatch.setattr(tpu_decode_blocks, "_MOST_SLOTS", 128)


def check(args, dtype="float32", **how) -> Partial:
    op = functools.partial(api.decode_attention, **how)
    run = lambda implementation: quick_jit(functools.partial(op, implementation=implementation))
    with pltpu.force_tpu_interpret_mode():
        got = run("mosaic_tpu")(*args)
    want = run("xla")(*args)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, want.out, **tolerance(dtype))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance(dtype))
    return got


@pytest.mark.parametrize("shape", CHECKED, ids=str)
def test_shapes(shape):
    got = check(shape.draw(0), shape.dtype)
    if shape.B * shape.K > 2:  # the last head is empty
        assert (got.lse[-1, :, -shape.G :] == -jnp.inf).all()
        assert not got.out[-1, :, -shape.G :].any()


def test_window_bias_and_scale():
    shape = DecodeShape(K=2, G=2, S=300, H=64)
    bias = jnp.float32(np.random.default_rng(1).normal(size=(1, 2, 300)))
    check(shape.draw(1), bias=bias, window=100, scale=0.1)


@pytest.mark.float8
def test_8_bit_floats_and_values_of_another_width():
    q, k, v, q_pos, k_pos = DecodeShape(K=2, G=2, S=160).draw(2)
    check((q, k.astype(jnp.float8_e4m3fn), v[..., :64].astype(jnp.float8_e5m2), q_pos, k_pos))


def test_more_heads_than_a_tile_holds(monkeypatch):
    # Of 8 heads: 128 slots with float32 keys and values of 64 channels.
    monkeypatch.setattr(tpu_decode_blocks, "_TILE_BYTES", 128 * 8 * (2 * 128 * 4 + 4))
    shape = DecodeShape(K=16, S=128, H=64)
    assert mosaic_tpu._sizes(*shape.abstract()[:3], shape.abstract()[4]).heads == 8
    check(shape.draw(3))


@pytest.mark.parametrize(
    "T, S, reason",
    [(129, 8, r"T \* G = 129 of q \[1, 129, 1, 128\]"), (1, 1, "takes 8 slots or more, got S = 1")],
)
def test_unsupported_shapes_are_named(T, S, reason):
    q, k, v, q_pos, k_pos = DecodeShape(T=T, S=8).draw(0)
    with pytest.raises(NotImplementedError, match=reason):
        api.decode_attention(q, k[:, :, :S], v[:, :, :S], q_pos, k_pos[..., :S], implementation="mosaic_tpu")
