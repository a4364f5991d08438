"""The TPU kernel of `decode_attention` over packed slots, interpreted, against the reference."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_decode_blocks
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.shapes import CHECKED_QUANTIZED, DecodeShape, QuantizedShape
from tests.pallas_kernels.kernel_tolerance import tolerance
from tests.quick_jit import quick_jit


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Of the few slots that an interpreted kernel reads in time."""
    monkeypatch.setattr(tpu_decode_blocks, "_MOST_SLOTS", 256)


def check(shape, args, **how):
    op = functools.partial(decode_attention, **how)
    with pltpu.force_tpu_interpret_mode():
        got = quick_jit(functools.partial(op, implementation="mosaic_tpu"))(*args)
    want = quick_jit(functools.partial(op, implementation="xla"))(*args)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, want.out, **tolerance(shape.decode.dtype))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance(shape.decode.dtype))
    return got


@pytest.mark.parametrize("shape", CHECKED_QUANTIZED, ids=str)
def test_shapes(shape):
    got, x = check(shape, shape.draw(0)), shape.decode
    if x.B * x.K > 2:  # the last head is empty
        assert (got.lse[-1, :, -x.G :] == -jnp.inf).all()
        assert not got.out[-1, :, -x.G :].any()


def test_window_bias_and_scale():
    shape = QuantizedShape(DecodeShape(G=2, S=96), 4)
    bias = jnp.float32(np.random.default_rng(1).normal(size=(1, 1, 96)))
    check(shape, shape.draw(1), bias=bias, window=40, scale=0.1)


@pytest.mark.parametrize(
    "shape, reason",
    [
        (QuantizedShape(DecodeShape(S=48), 8, key_group=12), "groups of a multiple of 8 tokens, got 12"),
        (QuantizedShape(DecodeShape(T=65, S=32), 8, value_group=16), r"T \* G \* 8 = 520"),
        (QuantizedShape(DecodeShape(S=32), 8, value_group=4), "up to 16 groups of channels, got 32"),
        (
            QuantizedShape(DecodeShape(S=65536), 8, key_group=32768),
            r"\[K, S, H\] = \[1, 65536, 128\] in groups of 32768",
        ),
    ],
)
def test_unsupported_shapes_are_named(shape, reason):
    args = shape.abstract()[:5]
    with pytest.raises(NotImplementedError, match=reason):
        decode_attention(*args, implementation="mosaic_tpu")
