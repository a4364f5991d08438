"""The TPU kernels over packed slots, interpreted, at every way in which queries, groups and words share registers."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_decode_blocks
from pallas_kernels.decode_attention.tiles.word_rows import halves, in_order
from pallas_kernels.shapes import DecodeShape, QuantizedShape, RaggedQuantizedShape, RaggedShape
from tests.pallas_kernels.attend import attend
from tests.pallas_kernels.kernel_tolerance import tolerance
from tests.quick_jit import quick_jit

SHAPES = (
    # Queries of a KV head that are in a register eight, four, two times and once, and that fill two.
    QuantizedShape(DecodeShape(K=2, G=1, S=512), 4),
    QuantizedShape(DecodeShape(K=2, G=2, S=512, dtype="bfloat16"), 8, value_group=16),
    QuantizedShape(DecodeShape(K=2, G=8, S=512, dtype="bfloat16"), 2),
    QuantizedShape(DecodeShape(T=2, G=5, S=512), 4, key_group=64),
    # Groups of keys that are half a chunk, a chunk, and no whole part of one.
    QuantizedShape(DecodeShape(G=4, S=1024, dtype="bfloat16"), 4, key_group=128),
    QuantizedShape(DecodeShape(G=4, S=2048, dtype="bfloat16"), 8, key_group=256),
    QuantizedShape(DecodeShape(G=4, S=768), 8, key_group=24),
    # Words of two runs of slots in a row.
    QuantizedShape(DecodeShape(K=2, G=4, S=512, H=64), 8),
    QuantizedShape(DecodeShape(K=2, G=1, S=512, H=64, dtype="bfloat16"), 4, value_group=64),
    QuantizedShape(DecodeShape(K=2, G=3, S=1024, H=64, dtype="bfloat16"), 2, "token", key_group=64),
    QuantizedShape(DecodeShape(K=2, G=4, S=512, H=64), 4, "token"),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, monkeypatch):
    monkeypatch.setattr(tpu_decode_blocks, "_MOST_SLOTS", 512)
    args = shape.draw(0)
    with pltpu.force_tpu_interpret_mode():
        got = quick_jit(functools.partial(attend, implementation="mosaic_tpu"))(*args)
    want = quick_jit(functools.partial(attend, implementation="xla"))(*args)
    np.testing.assert_allclose(got.out, want.out, **tolerance(shape.decode.dtype))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance(shape.decode.dtype))


@pytest.mark.parametrize("K, G", [(2, 4), (3, 1), (1, 2)])
def test_pages_whose_queries_fill_one_register(K, G):
    """Eight of them, and few that are there several times, padding included."""
    decode = DecodeShape(K=K, G=G, dtype="bfloat16")
    shape = RaggedQuantizedShape(RaggedShape(decode, 32, page=32), QuantizedShape(DecodeShape(), 4))
    args = shape.draw(0)
    with pltpu.force_tpu_interpret_mode():
        got = quick_jit(functools.partial(attend, implementation="mosaic_tpu"))(*args)
    want = quick_jit(functools.partial(attend, implementation="xla"))(*args)
    np.testing.assert_allclose(got.out, want.out, **tolerance("bfloat16"))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance("bfloat16"))


def test_zeros_far_from_the_codes_are_not_rounded():
    """Keys and values around 50: what bfloat16 products would lose of that is as large as their codes."""
    shape = QuantizedShape(DecodeShape(K=2, G=4, S=512, dtype="bfloat16"), 4)
    q, k, v, q_pos, k_pos = shape.draw(0)
    n = v.affine.shape[2] // 2
    moved = [k.replace(affine=k.affine.at[..., 128:].add(50)), v.replace(affine=v.affine.at[:, :, n:].add(50))]
    op = functools.partial(attend, scale=0.01)
    with pltpu.force_tpu_interpret_mode():
        got = quick_jit(functools.partial(op, implementation="mosaic_tpu"))(q, *moved, q_pos, k_pos)
    want = quick_jit(functools.partial(op, implementation="xla"))(q.astype(jnp.float32), *moved, q_pos, k_pos)
    # Of bfloat16 keys around 50 the reference itself would know an eighth.
    np.testing.assert_allclose(got.out, want.out, atol=0.03)


@pytest.mark.parametrize("per", [4, 8, 16])
def test_halves_of_rows_by_hand(per):
    slots = np.arange(512, dtype=np.float32) + np.float32([[0], [1000]])
    runs = slots.reshape(2, -1, 2, per)  # runs of slots, one after the other: two of them are a row
    first, second = halves(jnp.asarray(slots), per, jnp.float32)
    np.testing.assert_array_equal(first, runs[:, :, 0].reshape(2, -1))
    np.testing.assert_array_equal(second, runs[:, :, 1].reshape(2, -1))
    np.testing.assert_array_equal(in_order(first, second, per, jnp.float32), slots)
    np.testing.assert_allclose(in_order(first, second, per, jnp.bfloat16), slots, rtol=2**-16)
