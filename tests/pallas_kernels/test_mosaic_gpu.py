"""The GPU kernels as far as a machine without a GPU can tell: they lower for CUDA, and only for who asks for them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.mosaic_gpu import SLOTS, as_rows, by_token, parts
from pallas_kernels.partial import Partial
from pallas_kernels.shapes import DecodeShape

SHAPES = (
    DecodeShape(B=8, K=8, G=4, S=4096, dtype="bfloat16"),
    DecodeShape(B=2, T=4, K=3, G=3, S=SLOTS + 8, H=64, dtype="bfloat16"),
    DecodeShape(K=1, G=16, S=SLOTS, H=256, dtype="bfloat16"),
)


def for_cuda(op, *arrays, **static) -> str:
    """The program, lowered."""
    return jax.jit(functools.partial(op, **static)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_lowers_for_cuda(shape):
    *arrays, bias = shape.abstract(bias=True)
    op = lambda *arrays, **how: decode_attention(*arrays[:5], bias=arrays[5], **how)
    text = for_cuda(op, *arrays, bias, window=100, implementation="mosaic_gpu")
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    # Slots behind the last tile go to the reference.
    assert ("dot_general" in text) == (shape.S % SLOTS != 0)
    got = jax.eval_shape(functools.partial(op, implementation="mosaic_gpu"), *arrays, bias)
    assert got.out.shape == (shape.B, shape.T, shape.K * shape.G, shape.H) and got.out.dtype == jnp.float32
    assert got.lse.shape == got.out.shape[:3] and got.lse.dtype == jnp.float32


def test_nobody_gets_a_gpu_kernel_who_did_not_ask():
    *arrays, _ = SHAPES[0].abstract()
    assert "mosaic_gpu" not in for_cuda(decode_attention, *arrays)


def test_rows_and_tokens_are_inverse():
    q, _, _, q_pos, _ = DecodeShape(B=2, T=3, K=2, G=4, H=64).draw(0)
    rows, pos = as_rows(q, q_pos, 2, scale=1.0)
    assert rows.shape == (4, 64, 64) and pos.shape == (4, 64)
    assert (pos[:, 12:] == -1).all() and not rows[:, 12:].any()
    assert (pos[0, :12] == jnp.repeat(q_pos[0], 4)).all()
    back = by_token(Partial(rows, rows[..., 0]), 2, 3, 8)
    assert (back.out == q).all() and (back.lse == q[..., 0]).all()


def test_tiles_are_shared_out_to_fill_the_device():
    assert parts(heads=8, tiles=64) == 33 and parts(heads=8, tiles=3) == 3 and parts(heads=1024, tiles=64) == 1


@pytest.mark.parametrize(
    "shape, reason",
    [
        (DecodeShape(S=64), "takes bfloat16 queries, keys and values, got float32, float32 and float32"),
        (DecodeShape(S=56, dtype="bfloat16"), "takes a multiple of 8 slots from 64 on, got S = 56"),
        (DecodeShape(S=71, dtype="bfloat16"), "takes a multiple of 8 slots from 64 on, got S = 71"),
        (DecodeShape(T=65, S=64, dtype="bfloat16"), r"takes 1 to 64 queries a KV head, got T \* G = 65 of q"),
        (DecodeShape(S=64, H=96, dtype="bfloat16"), "takes heads of 64, 128 or 256 in q, k and v alike, got 96 and 96"),
    ],
)
def test_unsupported_shapes_are_named(shape, reason):
    *arrays, _ = shape.abstract()
    with pytest.raises(NotImplementedError, match=f"decode_attention: mosaic_gpu {reason}"):
        jax.eval_shape(functools.partial(decode_attention, implementation="mosaic_gpu"), *arrays)
