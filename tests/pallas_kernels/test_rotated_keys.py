"""`decode_attention` of keys from before the rotation: by hand, on expanded keys, and its TPU kernel."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_decode_blocks
from pallas_kernels.decode_attention import Rotation, reference
from pallas_kernels.shapes import CHECKED_LOWRANK, DecodeShape, LowrankShape
from tests.pallas_kernels.attend import attend
from tests.pallas_kernels.attention_numpy import attention
from tests.pallas_kernels.kernel_tolerance import tolerance
from tests.quick_jit import quick_jit


def run(implementation, args, mean=None, at=None, **how):
    *args, rotation = args
    op = functools.partial(attend, implementation=implementation, **how)
    return quick_jit(op)(*args, rotation._replace(mean=mean, at=at))


def turned(k, at, inv_freq):
    """Keys [B, K, S, H] as complex numbers, turned by numbers [B, K, S] times frequencies."""
    half = k.shape[-1] // 2
    z = (k[..., :half] + 1j * k[..., half:]) * np.exp(1j * np.asarray(at)[..., None] * np.float64(inv_freq))
    return np.concatenate([z.real, z.imag], axis=-1)


def unrotated(shape: DecodeShape, seed: int) -> tuple:
    """`(args, at)` of keys without a basis, rotated by other numbers than their tokens' positions."""
    q, k, v, q_pos, k_pos = shape.draw(seed)
    inv_freq = jnp.float32(10000.0 ** (-np.arange(0, shape.H, 2) / shape.H))
    return (q, k, v, q_pos, k_pos, Rotation(inv_freq)), jnp.maximum(jnp.cumsum(k_pos >= 0, axis=-1) - 1, 0)


def test_a_quarter_turn_by_hand():
    # One coordinate along channel 0. A token at position p turns it by p * pi/2: (1, 0), (0, 1), (-1, 0).
    c = jnp.float32([1.0, np.log(3.0), 5.0]).reshape(1, 1, 3, 1)
    v = jnp.float32([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    basis, inv_freq = jnp.float32([[1.0], [0.0]]).reshape(1, 1, 2, 1), jnp.float32([np.pi / 2])
    q = jnp.float32([0.0, 1.0]).reshape(1, 1, 1, 2)
    part = run("xla", (q, c, v, jnp.array([[2]]), jnp.array([[[0, 1, 2]]]), Rotation(inv_freq, basis=basis)), scale=1.0)
    # Logits 0, log 3 and 0.
    np.testing.assert_allclose(part.out.item(), (1 + 6 + 4) / 5, rtol=1e-6)
    np.testing.assert_allclose(part.lse.item(), np.log(5.0), rtol=1e-6)


@pytest.mark.parametrize("joint", [False, True])
def test_it_is_attention_over_expanded_and_rotated_keys(joint):
    shape = LowrankShape(DecodeShape(B=2, T=2, K=2, G=2, S=530, H=16), R=6, joint=joint)
    q, c, v, q_pos, k_pos, (inv_freq, _, basis, _) = args = shape.draw(1)
    mean = jnp.float32(np.random.default_rng(2).normal(size=(2, 16)))
    got = run("xla", args, mean, window=300)
    k = np.einsum("bksr,akhr->bksh", np.float64(c), np.float64(basis)) + np.float64(mean)[:, None]
    pos = np.broadcast_to(np.asarray(k_pos), k.shape[:3])
    want = attention(q, turned(k, pos, inv_freq), np.broadcast_to(v, (*k.shape[:3], 6)), q_pos, pos, window=300)
    # float32 angles of up to 530 radians are off by 3e-5.
    np.testing.assert_allclose(got.out, want.out, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(got.lse, want.lse, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shape", CHECKED_LOWRANK, ids=str)
def test_the_tpu_kernel(shape, monkeypatch):
    monkeypatch.setattr(tpu_decode_blocks, "_MOST_SLOTS", 128)
    args = shape.draw(0)
    mean = jnp.float32(np.random.default_rng(1).normal(size=(shape.decode.K, shape.decode.H)))
    with pltpu.force_tpu_interpret_mode():
        got = run("mosaic_tpu", args, mean, window=100)
    want = run("xla", args, mean, window=100)
    # The same angles, whose cosines are equal to a few units in the last place: as without a rotation. In bfloat16
    # the reference rounds keys twice, before and after their rotation.
    np.testing.assert_allclose(got.out, want.out, **tolerance(shape.decode.dtype))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance(shape.decode.dtype))


def test_keys_without_a_basis_are_rotated_by_what_is_said(monkeypatch):
    monkeypatch.setattr(reference, "_ROTATED", 200)
    args, at = unrotated(DecodeShape(B=2, T=2, K=2, G=2, S=530, H=16), 1)
    q, k, v, q_pos, k_pos, (inv_freq, *_) = args
    for by in (None, at):
        got = run("xla", args, at=by, window=300)
        of_keys = turned(np.float64(k), k_pos if by is None else by, inv_freq)
        want = attention(q, of_keys, v, q_pos, k_pos, window=300)
        np.testing.assert_allclose(got.out, want.out, rtol=2e-4, atol=2e-4)  # as above
        np.testing.assert_allclose(got.lse, want.lse, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("shape", [x.decode for x in CHECKED_LOWRANK], ids=str)
def test_the_tpu_kernel_without_a_basis(shape, ranked, monkeypatch):
    monkeypatch.setattr(tpu_decode_blocks, "_MOST_SLOTS", 128)
    args, at = unrotated(shape, 0)
    how = dict(at=at if ranked else None, window=100)
    with pltpu.force_tpu_interpret_mode():
        got = run("mosaic_tpu", args, **how)
    want = run("xla", args, **how)
    np.testing.assert_allclose(got.out, want.out, **tolerance(shape.dtype))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance(shape.dtype))


def test_unsupported_shapes_are_named():
    shape = LowrankShape(DecodeShape(H=24, S=8), R=4)
    with pytest.raises(NotImplementedError, match="heads of a multiple of 16 channels, got 24"):
        attend(*shape.abstract(), implementation="mosaic_tpu")
