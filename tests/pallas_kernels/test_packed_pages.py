"""The TPU kernel of `decode_attention` over packed pages, interpreted, against the reference."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import PageRun
from pallas_kernels.shapes import (
    CHECKED_RAGGED_QUANTIZED,
    DecodeShape,
    QuantizedShape,
    RaggedQuantizedShape,
    RaggedShape,
)
from tests.pallas_kernels.attend import attend
from tests.pallas_kernels.kernel_tolerance import tolerance
from tests.quick_jit import quick_jit

RUNS = [None, ([1, 30], [5, 9]), ([39, 0], [1, 40]), ([40, 3], [0, 0])]


def run(implementation, args, bias=None, runs=None, **how):
    *args, pages = args
    op = functools.partial(attend, implementation=implementation, **how)
    return quick_jit(lambda args, bias: op(*args, bias=bias))((*args, pages.replace(run=runs)), bias)


def page_run(runs, shape):
    B, P = shape.pages.decode.B, shape.pages.P
    if runs is None:
        return None
    first, count = (jnp.array(x[:B]) for x in runs)
    first = jnp.minimum(first, P)
    return PageRun(first, jnp.minimum(count, P - first))


@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("shape", CHECKED_RAGGED_QUANTIZED, ids=str)
def test_the_tpu_kernel(shape, runs):
    args, runs = shape.draw(0), page_run(runs, shape)
    bias = jnp.float32(np.random.default_rng(1).normal(size=args[4].shape))
    with pltpu.force_tpu_interpret_mode():
        got = run("mosaic_tpu", args, bias, runs, window=12)
    want = run("xla", args, bias, runs, window=12)
    dtype = shape.pages.decode.dtype
    np.testing.assert_allclose(got.out, want.out, **tolerance(dtype))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance(dtype))


def test_unsupported_shapes_are_named():
    shape = RaggedQuantizedShape(RaggedShape(DecodeShape(T=65, K=2), P=2, page=32), QuantizedShape(DecodeShape(), 4))
    with pytest.raises(NotImplementedError, match=r"T \* N = 130 of q \[1, 65, 2, 128\]"):
        attend(*shape.abstract(), implementation="mosaic_tpu")
