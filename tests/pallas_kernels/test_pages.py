"""`decode_attention` over pages: by hand, against heads cut out of their pages, and its TPU kernel."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import PageRun, Pages, pages
from pallas_kernels.shapes import CHECKED_RAGGED, DecodeShape, RaggedShape
from tests.pallas_kernels.attend import attend
from tests.pallas_kernels.attention_numpy import attention
from tests.pallas_kernels.kernel_tolerance import FLOAT32, tolerance
from tests.quick_jit import quick_jit


def run(implementation, args, **how):
    *args, owned = args
    args, bias = (*args, owned.replace(run=how.pop("run", None))), how.pop("bias", None)
    op = functools.partial(attend, implementation=implementation, **how)
    return quick_jit(lambda args, bias: op(*args, bias=bias))(args, bias)


def test_pages_of_two_heads_by_hand():
    # Head 0 owns pages 0 and 2, head 1 page 1: with zero keys every visible slot weighs the same.
    v = jnp.float32([[1, 2], [10, 20], [6, 99]]).reshape(1, 1, 6, 1)
    pos, owned = jnp.array([[[0, 1, 0, 1, 2, -1]]]), Pages(jnp.array([[0, 1, 0]]), 2)
    args = (jnp.zeros((1, 1, 2, 1)), jnp.zeros((1, 1, 6, 1)), v, jnp.array([[5]]), pos, owned)
    part = run("xla", args)
    np.testing.assert_allclose(part.out.ravel(), [3.0, 15.0], rtol=1e-6)
    np.testing.assert_allclose(part.lse.ravel(), np.log([3.0, 2.0]), rtol=1e-6)
    # In pages 1 and 2 head 0 has one slot; in page 2 head 1 has nothing.
    part = run("xla", args, run=PageRun(jnp.array([1]), jnp.array([2])))
    np.testing.assert_allclose(part.out.ravel(), [6.0, 15.0], rtol=1e-6)
    part = run("xla", args, run=PageRun(jnp.array([2]), jnp.array([1])))
    np.testing.assert_allclose(part.out.ravel(), [6.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(part.lse[..., 1], -jnp.inf)


def test_a_head_is_the_concatenation_of_its_pages():
    shape = RaggedShape(DecodeShape(T=2, K=3, G=2, H=16), P=9, page=4)
    q, k, v, q_pos, k_pos, owned = args = shape.draw(3)
    got = run("xla", args)
    for head in range(3):
        of = lambda x: np.asarray(x)[:, :, np.repeat(np.asarray(owned.owner)[0] == head, shape.page)]
        heads = slice(2 * head, 2 * head + 2)
        want = attention(q[:, :, heads], of(k), of(v), q_pos, of(k_pos))
        np.testing.assert_allclose(got.out[:, :, heads], want.out, **FLOAT32)
        np.testing.assert_allclose(got.lse[:, :, heads], want.lse, **FLOAT32)


def test_a_run_of_pages_is_a_list_of_its_own(monkeypatch):
    monkeypatch.setattr(pages, "_TILE", 4)
    shape = RaggedShape(DecodeShape(B=4, T=2, K=3, G=2, H=16), P=11, page=4)
    q, k, v, q_pos, k_pos, owned = args = shape.draw(3)
    runs = [(2, 7), (8, 3), (5, 0), (0, 11)]  # one that ends with the list, one of none, one of all
    got = run("xla", args, run=PageRun(*(jnp.array(x) for x in zip(*runs))))
    for row, (first, count) in enumerate(runs):
        of = lambda x: x[row : row + 1, :, first * shape.page : (first + count) * shape.page]
        mine = Pages(owned.owner[row : row + 1, first : first + count], 3)
        if count == 0:
            assert not got.out[row].any() and (got.lse[row] == -jnp.inf).all()
            continue
        want = run("xla", (q[row : row + 1], of(k), of(v), q_pos[row : row + 1], of(k_pos), mine))
        np.testing.assert_allclose(got.out[row], want.out[0], **FLOAT32)
        np.testing.assert_allclose(got.lse[row], want.lse[0], **FLOAT32)


@pytest.mark.parametrize("runs", [None, ([1, 30], [5, 90]), ([100, 159], [60, 1]), ([160, 0], [0, 0])], ids=str)
@pytest.mark.parametrize("shape", CHECKED_RAGGED, ids=str)
def test_the_tpu_kernel(shape, runs):
    """Of all pages, and of runs that begin and end within tiles, that are one page, or none at all."""
    B, P = shape.decode.B, shape.P
    if runs is not None:
        first, count = (jnp.array(x[:B]) for x in runs)
        runs = PageRun(jnp.minimum(first, P), jnp.minimum(count, P - jnp.minimum(first, P)))
    args = shape.draw(0)
    rng = np.random.default_rng(1)
    how = dict(
        window=12,
        bias=jnp.float32(rng.normal(size=args[4].shape)),
        run=runs,
    )
    with pltpu.force_tpu_interpret_mode():
        got = run("mosaic_tpu", args, **how)
    want = run("xla", args, **how)
    np.testing.assert_allclose(got.out, want.out, **tolerance(shape.decode.dtype))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance(shape.decode.dtype))


def test_unsupported_shapes_are_named():
    shape = RaggedShape(DecodeShape(T=65, K=2), P=2)
    with pytest.raises(NotImplementedError, match=r"T \* N = 130 of q \[1, 65, 2, 128\]"):
        attend(*shape.abstract(), implementation="mosaic_tpu")
