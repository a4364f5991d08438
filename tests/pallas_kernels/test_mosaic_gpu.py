"""The GPU kernels as far as a machine without a GPU can tell: they lower for CUDA, and only for who asks for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import PageRun, decode_attention
from pallas_kernels.decode_attention.mosaic_gpu_dense import SLOTS, as_rows, by_token, parts
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import quantize_pack, words_in_row
from pallas_kernels.shapes import DecodeShape, RaggedShape
from tests.pallas_kernels.attend import attend
from tests.quick_jit import quick_jit

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


def quantized(shape: DecodeShape, bits: int, axis: str, group=32, channels=32, scale_dtype="bfloat16") -> tuple:
    """Abstract `(q, k, v, q_pos, k_pos)`."""
    q, k, v, q_pos, k_pos, _ = shape.abstract()
    valid = jax.ShapeDtypeStruct(k_pos.shape, bool)
    how = dict(bits=bits, scale_dtype=scale_dtype, in_row=words_in_row(shape.H, shape.S * bits // 32))
    pack = lambda group, axis: jax.eval_shape(functools.partial(quantize_pack, group=group, axis=axis, **how), k, valid)
    return q, pack(group if axis == "channel" else channels, axis), pack(channels, "token"), q_pos, k_pos


@pytest.mark.parametrize(
    "bits, shape, axis, group, channels",
    [
        (8, DecodeShape(B=2, K=8, G=4, S=4096, dtype="bfloat16"), "channel", 32, 128),
        (4, DecodeShape(K=8, G=4, S=4096 + 64, dtype="bfloat16"), "channel", 32, 32),
        (2, DecodeShape(K=3, T=2, G=3, S=4096, H=64, dtype="bfloat16"), "channel", 64, 64),
        (4, DecodeShape(K=3, G=3, S=2048, H=64, dtype="bfloat16"), "token", None, 32),
    ],
)
def test_quantized_lowers_for_cuda(bits, shape, axis, group, channels):
    arrays = quantized(shape, bits, axis, group, channels)
    bias = jax.ShapeDtypeStruct(arrays[4].shape, jnp.float32)
    op = lambda *arrays, **how: decode_attention(*arrays[:5], bias=arrays[5], **how)
    how = dict(window=100, implementation="mosaic_gpu")
    text = for_cuda(op, *arrays, bias, **how)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert ("dot_general" in text) == (shape.S % (SLOTS * (group or 32)) != 0)
    got = jax.eval_shape(functools.partial(op, **how), *arrays, bias)
    assert got.out.shape == (shape.B, shape.T, shape.K * shape.G, shape.H)


@pytest.mark.parametrize(
    "shape",
    [
        RaggedShape(DecodeShape(B=2, K=8, G=4, dtype="bfloat16"), P=256),
        RaggedShape(DecodeShape(T=2, K=3, G=3, H=64, dtype="bfloat16"), P=13, page=8),
        RaggedShape(DecodeShape(K=1, G=4, H=256, dtype="bfloat16"), P=3, page=128),
    ],
    ids=str,
)
def test_ragged_lowers_for_cuda(shape):
    *arrays, pages = shape.abstract()
    pages = pages.replace(run=PageRun(*[jax.ShapeDtypeStruct((shape.decode.B,), jnp.int32)] * 2))
    how = dict(window=100, implementation="mosaic_gpu")
    text = for_cuda(attend, *arrays, pages, **how)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert ("dot_general" in text) == (shape.P * shape.page % SLOTS != 0)
    got = jax.eval_shape(functools.partial(attend, **how), *arrays, pages)
    assert got.out.shape == (shape.decode.B, shape.decode.T, shape.decode.K * shape.decode.G, shape.decode.H)


def test_nobody_gets_a_gpu_kernel_who_did_not_ask():
    *arrays, _ = SHAPES[0].abstract()
    assert "mosaic_gpu" not in for_cuda(decode_attention, *arrays)
    arrays = quantized(DecodeShape(S=2048, dtype="bfloat16"), 4, "channel")
    assert "mosaic_gpu" not in for_cuda(decode_attention, *arrays)
    arrays = RaggedShape(DecodeShape(dtype="bfloat16"), P=8).abstract()
    assert "mosaic_gpu" not in for_cuda(attend, *arrays)


def test_rows_and_tokens_are_inverse():
    q, _, _, q_pos, _ = DecodeShape(B=2, T=3, K=2, G=4, H=64).draw(0)
    rows, pos = quick_jit(lambda *x: as_rows(*x, 2, scale=1.0))(q, q_pos)
    assert rows.shape == (4, 64, 64) and pos.shape == (4, 64)
    rows_, pos, q, q_pos = map(np.asarray, (rows, pos, q, q_pos))
    assert (pos[:, 12:] == -1).all() and not rows_[:, 12:].any()
    assert (pos[0, :12] == np.repeat(q_pos[0], 4)).all()
    back = quick_jit(lambda rows: by_token(Partial(rows, rows[..., 0]), 2, 3, 8))(rows)
    np.testing.assert_array_equal(back.out, q)
    np.testing.assert_array_equal(back.lse, q[..., 0])


def test_tiles_are_shared_out_to_fill_the_device():
    assert [parts(heads, tiles, 264) for heads, tiles in ((8, 64), (8, 3), (1024, 64))] == [33, 3, 1]


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


@pytest.mark.parametrize(
    "shape, how, reason",
    [
        (DecodeShape(S=2048), {}, "takes bfloat16 queries and scales, got float32 and bfloat16"),
        (DecodeShape(S=2048, H=256, dtype="bfloat16"), {}, "takes heads of 64 or 128 in q, k and v alike, got 256"),
        (DecodeShape(S=1024, dtype="bfloat16"), {}, "takes whole groups of 32 slots, 64 or more, got S = 1024"),
        (DecodeShape(S=8192, dtype="bfloat16"), dict(group=128), "holds 64 groups of .* too much in groups of 128"),
        (DecodeShape(S=2048, dtype="bfloat16"), dict(channels=16), "takes values with a scale for a multiple of 32"),
        (DecodeShape(S=2048, dtype="bfloat16"), dict(group=4), "takes groups of whole words and a multiple of 8"),
    ],
)
def test_unsupported_packed_shapes_are_named(shape, how, reason):
    arrays = quantized(shape, 4, "channel", **how)
    op = functools.partial(decode_attention, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=f"decode_attention: mosaic_gpu {reason}"):
        jax.eval_shape(op, *arrays)


@pytest.mark.parametrize(
    "shape, reason",
    [
        (RaggedShape(DecodeShape(), P=8), "takes bfloat16 queries, keys and values, got float32"),
        (RaggedShape(DecodeShape(H=96, dtype="bfloat16"), P=8), "takes heads of 64, 128 or 256 in q, k and v alike"),
        (RaggedShape(DecodeShape(T=3, K=8, G=4, dtype="bfloat16"), P=8), r"got T \* N = 96 of q"),
        (RaggedShape(DecodeShape(dtype="bfloat16"), P=8, page=24), "takes pages of 8, 16, 32 or .* slots, got 24"),
        (RaggedShape(DecodeShape(dtype="bfloat16"), P=3), "takes at least 64 slots in all pages, got 3 pages of 16"),
    ],
)
def test_unsupported_pages_are_named(shape, reason):
    op = functools.partial(attend, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=f"decode_attention: mosaic_gpu .*{reason}"):
        jax.eval_shape(op, *shape.abstract())
