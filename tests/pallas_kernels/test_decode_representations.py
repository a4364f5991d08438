"""`decode_attention` over any pair of representations, with gains, rotations, shared heads and pages, against NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from pallas_kernels.decode_attention import PageRun, Pages, Rotation, api, pages, reference
from pallas_kernels.encoded import cut_slots
from pallas_kernels.levels import nearest_levels
from pallas_kernels.logits import SoftCap
from pallas_kernels.product_quantize import product_quantize
from pallas_kernels.quantize_pack import quantize_pack
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

B, T, K, G, H = 2, 2, 2, 2, 16
PAGE = 32
SLOTS = 160

LEVELS = {
    2: [-1.5, -0.45, 0.45, 1.5],
    3: [-2.15, -1.34, -0.76, -0.25, 0.25, 0.76, 1.34, 2.15],
    4: np.linspace(-2.5, 2.5, 16) ** 3 / 6,
}


@struct.dataclass
class Halves:
    """A foreign representation: two arrays whose sum is meant, of the slots one by one."""

    a: jax.Array
    b: jax.Array

    block = 1

    @property
    def shape(self):
        return self.a.shape

    def cut(self, start, size):
        return jax.tree.map(lambda x: cut_slots(x, start, size), self)

    def decode(self, dtype=jnp.float32):
        return (self.a + self.b).astype(dtype)


def _affine(bits, axis):
    how = dict(bits=bits, group=8, axis=axis, scale_dtype="bfloat16", in_row=2 if bits < 8 else 1)
    return lambda x: quantize_pack(x, jnp.ones(x.shape[:3], bool), **how)


def _codes(x):
    R = x.shape[3]
    codebook = jnp.float32(np.random.default_rng(0).normal(size=(R // 2, 64, 2)))
    return product_quantize(x, jnp.ones(x.shape[:3], bool), codebook)


CODECS = {
    "f32": lambda x: x,
    "bf16": lambda x: x.astype(jnp.bfloat16),
    "fp8": lambda x: x.astype(jnp.float8_e4m3fn),
    "int8 channel": _affine(8, "channel"),
    "int4 channel": _affine(4, "channel"),
    "int2 channel": _affine(2, "channel"),
    "int8 token": _affine(8, "token"),
    "int4 token": _affine(4, "token"),
    "int2 token": _affine(2, "token"),
    "codebook": _codes,
    "levels 2": lambda x: nearest_levels(x, jnp.float32(LEVELS[2])),
    "levels 3": lambda x: nearest_levels(x, jnp.float32(LEVELS[3])),
    "levels 4": lambda x: nearest_levels(x, jnp.float32(LEVELS[4]), in_row=2),
    "foreign": lambda x: Halves(x + 1, jnp.full_like(x, -1)),
}


@functools.cache
def encoded(name: str, seed: int, heads: int, S: int, R: int):
    x = jnp.float32(np.random.default_rng(seed).normal(size=(B, heads, S, R)))
    return quick_jit(CODECS[name])(x)


def decoded(x) -> np.ndarray:
    return np.float64(x.decode() if hasattr(x, "decode") else x.astype(jnp.float32))


def rotated(x, pos, inv_freq):
    """[B, K, S, H] turned as complex numbers."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.asarray(pos)[..., None] * np.float64(inv_freq))
    return np.concatenate([z.real, z.imag], axis=-1)


class Case:
    """Drawn inputs, and what NumPy makes of them."""

    def __init__(
        self,
        key,
        value,
        seed,
        *,
        gains=False,
        rotation=None,
        heads=(K, K),
        pages=False,
        S=SLOTS,
        bias=False,
        dtype=jnp.float32,
    ):
        rng = np.random.default_rng(seed)
        self.heads = (1, 1) if pages else heads
        R = 8 if rotation == "basis" else H
        draw = lambda *shape: jnp.float32(rng.normal(size=shape))
        self.q = draw(B, T, K * G, H).astype(dtype)
        self.k, self.v = (encoded(*x, S, R) for x in zip((key, value), (seed, seed + 1), self.heads))
        width = max(self.heads)
        k_pos = np.tile(np.arange(S), (B, width, 1))
        self.k_pos = np.int32(rng.permuted(np.where(rng.random(k_pos.shape) < 0.125, -1, k_pos), axis=2))
        self.q_pos = np.int32(np.sort(rng.integers(S // 2, S + 1, size=(B, T)), axis=1))
        number = lambda low: jnp.float32(rng.uniform(low, 2, size=(B, width, S)))
        self.gains = dict(k_gain=number(0.2), v_gain=number(-1.0)) if gains else {}
        self.bias = dict(bias=number(-1.0)) if bias else {}
        self.rotation = None
        if rotation:
            at = np.int32(rng.integers(0, 300, size=(B, width, S))) if rotation == "rank" else None
            basis = mean = None
            if rotation == "basis":
                basis, mean = draw(1, K, H, R) * R**-0.5, draw(K, H)
            self.rotation = Rotation(jnp.float32(100.0 ** (-np.arange(0, H, 2) / H)), at, basis, mean)
        self.pages = Pages(jnp.int32(rng.integers(0, K, size=(B, S // PAGE))), K) if pages else None

    def arrays(self):
        more = dict(**self.gains, **self.bias, rotation=self.rotation, pages=self.pages)
        return (self.q, self.k, self.v, self.q_pos, self.k_pos), more

    def run(self, **static):
        how = dict(implementation="xla", **static)
        op = quick_jit(lambda args, more: api.decode_attention(*args, **more, **how))
        return op(*self.arrays())

    def want(self, q_pos=None, **static):
        """One KV head of a row at a time, whose slots are its own, or those of its pages."""
        k = decoded(self.k)
        v = k if self.v is None else decoded(self.v)
        gain = {name: np.float64(x) for name, x in self.gains.items()}
        bias = np.float64(self.bias["bias"]) if self.bias else None
        parts = []
        for b, head in itertools.product(range(B), range(K)):
            of = lambda x: x[b, min(head, x.shape[1] - 1)]  # one head serves all
            slots = slice(None)
            if self.pages is not None:
                index = np.arange(self.k_pos.shape[2]) // PAGE
                mine = np.asarray(self.pages.owner)[b, index] == head
                if self.pages.run is not None:
                    first, count = (int(x[b]) for x in self.pages.run)
                    mine &= (index >= first) & (index < first + count)
                slots = np.flatnonzero(mine)
            keys, values, pos = of(k)[slots], of(v)[slots], of(self.k_pos)[slots]
            if gain:
                keys = keys * of(gain["k_gain"])[slots][:, None]
                values = values * of(gain["v_gain"])[slots][:, None]
            if self.rotation is not None:
                inv_freq, at, basis, mean = self.rotation
                if basis is not None:
                    keys = keys @ np.float64(basis)[0, head].T + np.float64(mean)[head]
                keys = rotated(keys, pos if at is None else of(np.asarray(at))[slots], inv_freq)
            more = {} if bias is None else dict(bias=of(bias)[slots][None, None])
            q = decoded(self.q)[b : b + 1, :, head * G : (head + 1) * G]
            one = lambda x: x[None, None]
            parts.append(attention(q, one(keys), one(values), self.q_pos[b : b + 1], one(pos), **more, **static))
        whole = lambda name: np.concatenate(
            [np.concatenate([getattr(parts[b * K + n], name) for n in range(K)], axis=2) for b in range(B)]
        )
        return whole("out"), whole("lse")


def check(case, tolerance=1e-4, **static):
    got, (out, lse) = case.run(**static), case.want(**static)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, out, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got.lse, lse, rtol=tolerance, atol=tolerance)


def close(*names) -> float:
    """Queries and weights are rounded to 8 bits beside bfloat16; float32 angles of 300 radians are off by 3e-5."""
    return 3e-2 if "bf16" in names else 2e-4


VARIANTS = (
    dict(),
    dict(gains=True),
    dict(rotation="at_attend", gains=True),
    dict(rotation="basis"),
    dict(pages=True, gains=True),
    dict(pages=True, rotation="basis"),
)


def _pairs() -> list:
    """Every pair of representations, variants in turn; most of them slow, for keys and values are read apart."""
    found = []
    for (i, key), (j, value) in itertools.product(enumerate(CODECS), repeat=2):
        variant = (i + j) % len(VARIANTS)
        marks = () if (j - i) % len(CODECS) in (0, 5) else pytest.mark.slow
        found.append(pytest.param(key, value, VARIANTS[variant], id=f"{key}-{value}-{variant}", marks=marks))
    return found


@pytest.mark.parametrize("key, value, variant", _pairs())
def test_every_pair(key, value, variant):
    check(Case(key, value, 0, S=64, **variant), close(key, value))


@pytest.fixture
def small_tiles(monkeypatch):
    for name in ("_TILE", "_ROTATED"):
        monkeypatch.setattr(reference, name, 64)
    monkeypatch.setattr(pages, "_TILE", 2)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("key, value", [("f32", "fp8"), ("int8 channel", "levels 3")])
def test_several_tiles(small_tiles, key, value, variant):
    check(Case(key, value, 1, bias=True, **variant), close(key, value), window=100, scale=0.3)


@pytest.mark.parametrize("heads", [(1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("rotation", [None, "rank", "basis"])
def test_one_head_serves_all(heads, rotation):
    check(Case("int4 token", "f32", 2, S=64, heads=heads, gains=True, rotation=rotation), close())


def test_all_of_one_head():
    """Coordinates of all heads together, with one position for all."""
    check(Case("levels 4", "int8 token", 3, S=64, heads=(1, 1), gains=True, bias=True, rotation="basis"), close())


@pytest.mark.parametrize("key", ["f32", "int8 token", "codebook"])
def test_keys_are_the_values(key):
    case = Case(key, key, 4, S=64, gains=True)
    case.v = None
    check(case, close())


@pytest.mark.parametrize("first, count", [([1, 3], [3, 0]), ([2, 0], [3, 5]), ([5, 4], [0, 1])])
@pytest.mark.parametrize("key, value", [("int4 channel", "levels 2"), ("int2 token", "f32")])
def test_a_run_of_encoded_pages(small_tiles, key, value, first, count):
    """Within the list, to its end, of all of it, and of none."""
    case = Case(key, value, 5, pages=True, bias=True)
    case.pages = case.pages.replace(run=PageRun(jnp.array(first), jnp.array(count)))
    check(case, close())


@pytest.mark.parametrize("S", [16, 64, 80, 128, 176])
def test_tile_counts(small_tiles, S):
    check(Case("int4 channel", "int4 token", 9, S=S, bias=True), close())


@pytest.mark.parametrize("group", [24, 48, 96])
def test_groups_that_do_not_divide_a_tile_or_are_larger(small_tiles, group):
    case = Case("f32", "int8 token", 10, S=288)
    pack = functools.partial(quantize_pack, bits=2, group=group, axis="channel", scale_dtype="bfloat16", in_row=1)
    case.k = quick_jit(pack)(case.k, case.k_pos >= 0)
    assert case.k.block == np.lcm(group, 16)
    check(case, close())


def test_bfloat16_queries():
    check(Case("int8 channel", "levels 4", 11, S=64, dtype=jnp.bfloat16), close("bf16"))


def test_gains_are_inside_the_cap():
    case = Case("int8 channel", "f32", 6, S=64, gains=True)
    got = case.run(scale=SoftCap(0.5, 2.0))
    q, k = np.float64(case.q)[0, 0, 0], decoded(case.k)[0, 0] * np.float64(case.gains["k_gain"])[0, 0, :, None]
    seen = (case.k_pos[0, 0] >= 0) & (case.k_pos[0, 0] <= case.q_pos[0, 0])
    lse = np.log(np.exp(2.0 * np.tanh(0.5 * (k @ q) / 2.0))[seen].sum())
    np.testing.assert_allclose(got.lse[0, 0, 0], lse, rtol=1e-5)


@pytest.mark.parametrize("name", ["f32", "int8 channel", "int8 token", "codebook", "levels 3"])
def test_no_slots_are_an_empty_part(name):
    case = Case(name, name, 7, S=64)
    empty = lambda x: x.cut(0, 0) if hasattr(x, "cut") else x[:, :, :0]
    case.k, case.v, case.k_pos = empty(case.k), empty(case.v), case.k_pos[:, :, :0]
    part = case.run()
    assert part.out.shape == (B, T, K * G, H) and not part.out.any() and (part.lse == -jnp.inf).all()


@pytest.mark.parametrize("name", [name for name in CODECS if name not in ("f32", "bf16", "fp8")])
def test_a_cut_is_decoded_as_it_was_in_the_whole(name):
    x = encoded(name, 0, K, SLOTS, H)
    assert x.shape == (B, K, SLOTS, H) and SLOTS % x.block == 0
    start = np.array([x.block, 2 * x.block])
    piece = quick_jit(lambda x, at: x.cut(at, 2 * x.block))
    whole, size = decoded(x), 2 * x.block
    np.testing.assert_array_equal(decoded(piece(x, jnp.int32(x.block))), whole[:, :, x.block : x.block + size])
    by_row = [whole[b, :, at : at + size] for b, at in enumerate(start)]
    np.testing.assert_array_equal(decoded(piece(x, jnp.int32(start))), by_row)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k_gain=jnp.zeros((B, K, 32))), r"k_gain must have slots of \[B, K, S\] = \[2, 2, 64\]"),
        (dict(bias=jnp.zeros((B, 3, 64))), "the same KV heads, or one"),
        (dict(rotation=Rotation(jnp.zeros(8), mean=jnp.zeros((3, H)))), "the same KV heads, .* 'rotation.mean': 3"),
        (dict(pages=Pages(jnp.zeros((B, 2), jnp.int32), K)), "pages must be lists of one head"),
        (dict(rotation=Rotation(jnp.zeros(8), basis=jnp.zeros((1, K, 8, H)))), "the 16 channels of the queries, got 8"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    args, _ = Case("f32", "int4 token", 8, S=64).arrays()
    with pytest.raises(ValueError, match=message):
        api.decode_attention(*args, **change)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_nearest(bits):
    x = np.random.default_rng(bits).normal(size=(1, 2, 64, 8)).astype(np.float32)
    table = np.float32(LEVELS[bits])
    got = nearest_levels(jnp.asarray(x), jnp.asarray(table), in_row=2)
    assert got.shape == x.shape and got.block == 64 // {2: 2, 3: 1, 4: 4}[bits]
    np.testing.assert_array_equal(got.decode(), table[np.abs(x[..., None] - table).argmin(-1)])
    assert sum(words.nbytes for words in got.planes) == x.size * bits // 8


def test_levels_by_hand():
    """Codes 0 to 7 in slots 0 to 7: their low two bits in a word of one plane, the third in one of the other."""
    x = jnp.tile(jnp.arange(8.0), 4).reshape(1, 1, 32, 1)
    low, high = nearest_levels(x, jnp.arange(8.0)).planes
    assert low.ravel().tolist() == [0b1110010011100100_1110010011100100] * 2
    assert high.ravel().tolist() == [0b11110000_11110000_11110000_11110000]


@pytest.mark.parametrize(
    "table, S, message",
    [
        (jnp.zeros(5), 64, r"table must be f32\[4\], f32\[8\] or f32\[16\], got shape \[5\]"),
        (jnp.arange(8.0), 48, "slots must be a multiple of 32 for 3-bit levels, got 48"),
    ],
)
def test_levels_refuse(table, S, message):
    with pytest.raises(ValueError, match=message):
        nearest_levels(jnp.zeros((1, 1, S, 8)), table)
