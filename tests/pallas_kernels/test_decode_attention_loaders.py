"""The TPU kernel of `decode_attention`, interpreted: any keys beside any values, gains, rotations and pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_decode_blocks
from pallas_kernels.decode_attention import PageRun, Pages, Rotation, api
from pallas_kernels.levels import nearest_levels
from pallas_kernels.quantize_pack import quantize_pack, words_in_row
from tests.pallas_kernels.kernel_tolerance import tolerance
from tests.quick_jit import quick_jit

K, G = 2, 4


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Of the few slots that an interpreted kernel reads in time."""
    monkeypatch.setattr(tpu_decode_blocks, "_MOST_SLOTS", 256)


def affine(bits, axis, group=32):
    def pack(x):
        in_row = words_in_row(x.shape[3], x.shape[2] * bits // 32)
        how = dict(bits=bits, group=group, axis=axis, scale_dtype="bfloat16", in_row=in_row)
        return quantize_pack(x, jnp.ones(x.shape[:3], bool), implementation="xla", **how)

    return pack


def levels(bits):
    table = jnp.float32(np.linspace(-1.6, 1.6, 2**bits) ** 3)
    return lambda x: nearest_levels(x, table, in_row=128 // x.shape[3])


CODECS = {
    "dense": lambda x: x,
    "bf16": lambda x: x.astype(jnp.bfloat16),
    "fp8": lambda x: x.astype(jnp.float8_e4m3fn),
    "int8 channel": affine(8, "channel"),
    "int4 channel": affine(4, "channel"),
    "int4 token": affine(4, "token", 64),
    "int2 token": affine(2, "token"),
    "levels 2": levels(2),
    "levels 3": levels(3),
    "levels 4": levels(4),
}


def draw(key, value, seed, *, S=512, H=128, T=1, heads=(K, K), dtype="float32", gains=False, B=1):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    q = normal(B, T, K * G, H).astype(dtype)
    k, v = (quick_jit(CODECS[name])(normal(B, n, S, H)) for name, n in zip((key, value), heads))
    width = max(heads)
    k_pos = np.where(rng.random((B, width, S)) < 0.125, -1, rng.permuted(np.tile(np.arange(S), (B, width, 1)), axis=2))
    q_pos = jnp.int32(np.sort(rng.integers(S // 2, S + 1, size=(B, T)), axis=1))
    number = lambda: jnp.float32(rng.uniform(0.2, 2, size=(B, width, S)))
    more = dict(k_gain=number(), v_gain=-number(), bias=number()) if gains else {}
    return (q, k, v, q_pos, jnp.int32(k_pos)), more


def check(args, more, dtype="float32", **static):
    run = lambda name: quick_jit(
        lambda args, more: api.decode_attention(*args, **more, implementation=name, **static)
    )
    with pltpu.force_tpu_interpret_mode():
        got = run("mosaic_tpu")(args, more)
    want = run("xla")(args, more)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, want.out, **tolerance(dtype))
    np.testing.assert_allclose(got.lse, want.lse, **tolerance(dtype))


@pytest.mark.parametrize(
    "key, value",
    [
        ("int8 channel", "int4 token"),
        ("int4 token", "dense"),
        ("dense", "int2 token"),
        ("bf16", "levels 3"),
        ("levels 3", "int4 token"),
        ("levels 4", "levels 2"),
        ("levels 2", "fp8"),
        ("fp8", "levels 4"),
    ],
)
def test_mixed_pairs(key, value):
    dtype = "bfloat16" if "bf16" in (key, value) else "float32"
    check(*draw(key, value, 0, dtype=dtype), dtype)


@pytest.mark.parametrize("pair", [("dense", "dense"), ("int4 channel", "levels 4")], ids=str)
def test_gains(pair):
    """In a last tile that reaches over the end, too."""
    check(*draw(*pair, 1, S=608 if "dense" in pair else 640, T=2, gains=True), window=300, scale=0.05)


@pytest.mark.parametrize(
    "pair", [("levels 4", "levels 2"), ("int4 token", "levels 3"), ("levels 3", "levels 4")], ids=str
)
def test_two_words_in_a_row(pair):
    check(*draw(*pair, 2, H=64, gains=True))


@pytest.mark.parametrize("heads", [(1, K), (K, 1)], ids=str)
def test_one_head_serves_all(heads):
    check(*draw("int4 channel", "int4 token", 3, heads=heads, gains=True))


def test_keys_are_the_values():
    for name in ("dense", "int4 token", "levels 4"):
        (q, k, _, *rest), more = draw(name, name, 4, gains=True)
        check((q, k, None, *rest), more)


def test_gains_inside_a_mean():
    (q, k, v, *rest), more = draw("dense", "levels 4", 5, gains=True)
    rng = np.random.default_rng(5)
    basis, mean = rng.normal(size=(1, K, 128, 128)) / 11, rng.normal(size=(K, 128))
    inv_freq = jnp.float32(1000.0 ** (-np.arange(0, 128, 2) / 128))
    rotation = Rotation(inv_freq, None, jnp.float32(basis), jnp.float32(mean))
    check((q, k, v, *rest), dict(rotation=rotation, **more))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("key", ["fp8", "int4 channel", "int4 token", "levels 3"])
def test_codes_are_rotated_when_they_are_read(key, mean):
    """As they are, and as coordinates of 64 channels, whose words lie two in a row."""
    R = 64 if mean and not key.startswith("levels") else 128
    (q, *_), _ = draw("dense", "dense", 9)
    (_, k, v, *rest), more = draw(key, "dense", 9, H=R, gains=mean)
    rng = np.random.default_rng(9)
    inv_freq = jnp.float32(1000.0 ** (-np.arange(0, 128, 2) / 128))
    basis = jnp.float32(rng.normal(size=(1, K, 128, R)) * R**-0.5)
    rotation = Rotation(inv_freq, rest[1] // 2, basis, jnp.float32(rng.normal(size=(K, 128))))
    check((q, k, v, *rest), dict(rotation=rotation if mean else Rotation(inv_freq), **more))


@pytest.mark.parametrize("pair", [("int8 channel", "dense"), ("levels 3", "int2 token")], ids=str)
def test_pages(pair):
    args, more = draw(*pair, 6, S=2048, heads=(1, 1), gains=True)
    owner = jnp.int32(np.random.default_rng(7).integers(0, K, size=(1, 16)))
    more["k_gain"] = jnp.where(jnp.arange(2048) % 5 == 0, 0.0, more["k_gain"] - 1)  # a slot of no norm, and signs
    check(args, dict(pages=Pages(owner, K, PageRun(jnp.array([3]), jnp.array([11]))), **more))


def test_unrotated_pages():
    args, more = draw("dense", "int4 token", 8, S=1024, heads=(1, 1))
    inv_freq = jnp.float32(1000.0 ** (-np.arange(0, 128, 2) / 128))
    owner = jnp.int32(np.random.default_rng(7).integers(0, K, size=(1, 8)))
    check(args, dict(pages=Pages(owner, K), rotation=Rotation(inv_freq)))


@pytest.mark.parametrize(
    "key, value, H, reason",
    [
        ("dense", "int4 channel", 128, "takes values that are packed per token"),
        ("dense", "levels 3", 32, "takes one or two runs in a row of a multiple of 256 slots, got 4"),
        ("levels 4", "dense", 96, "takes keys of levels that fill 128 lanes, got 96 channels"),
    ],
)
def test_unsupported_representations_are_named(key, value, H, reason):
    args, _ = draw(key, value, 0, H=H)
    with pytest.raises(NotImplementedError, match=f"decode_attention: mosaic_tpu {reason}"):
        jax.eval_shape(functools.partial(api.decode_attention, implementation="mosaic_tpu"), *args)
