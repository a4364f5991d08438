"""Every method of codes holds what its paper's steps give, for whole blocks of the prompt and of generated tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Rope, methods, rotate
from kvjax.codecs.sketch import _orthogonal
from tests.kvjax import papers_of_codes as papers
from tests.kvjax.slot_arrays import seen_of, slots_cache
from tests.quick_jit import quick_jit

K, T, H = 2, 64, 16
LENGTHS = (T, 40)
NEAR = 0.06
"""Codes whose exact number is that close to a tie may round the other way: scales are bfloat16, rounded outwards."""


def _random(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(2, K, T, H)) * np.linspace(0.5, 3.0, H)
    return np.float64(np.float32(x))


KEYS, VALUES = _random(0), _random(1)


def _stored(transform, k=KEYS, lengths=LENGTHS, room=0, **seen):
    """Dense keys and values [T, H] in token order, of `(row, head)`; NaN for tokens that are not held."""

    def run(cache, observation):
        return transform.init(cache, observation)[0].layers[0]

    layer = quick_jit(run)(slots_cache(k, lengths, VALUES), seen_of(lengths, prompt_slots=T, **seen))
    return layer, _dense(layer)


def _dense(layer):
    out = np.full((2, 2, K, T + 64, H), np.nan)
    for segment in layer.segments:
        dense = quick_jit(lambda part: part.dense())(segment)
        pos = np.asarray(dense.pos)
        for b, h, s in np.argwhere(pos >= 0):
            out[0, b, h, pos[b, h, s]], out[1, b, h, pos[b, h, s]] = dense.k[b, h, s], dense.v[b, h, s]
    return out


def _heads():
    return [(row, head) for row in range(2) for head in range(K)]


def test_qserve():
    _, (keys, values) = _stored(methods.qserve(scale_dtype="float32"))
    for row, head in _heads():
        n = LENGTHS[row]
        want, tie = papers.qserve(KEYS[row, head, :n], 4, 0.5)
        np.testing.assert_allclose(keys[row, head, :n][tie > 1e-3], want[tie > 1e-3], rtol=1e-4, atol=1e-4)
        want, tie = papers.affine(VALUES[row, head, :n], 4, 1)
        np.testing.assert_allclose(values[row, head, :n][tie > 1e-3], want[tie > 1e-3], rtol=1e-4, atol=1e-4)


def test_saq_quantizes_a_block_again_at_every_step_down():
    lengths = LENGTHS
    method = methods.saq((8, 4, 2), (1, 1), group=16, residual=16)
    layer, _ = _stored(method, lengths=lengths)
    segment = layer.segments[-1].reserve(32)
    new = np.float32(np.random.default_rng(3).normal(size=(2, K, 32, H)))
    append = quick_jit(lambda part, x, pos: part.append(x, x, pos, None))
    for start in (0, 1, 2, 3, 4):  # one by one, and many at once
        size = 28 if start == 4 else 1
        pos = jnp.array(lengths)[:, None] + start + jnp.arange(size)
        segment = append(segment, jnp.asarray(new[:, :, start : start + size]), pos)
    keys, values = _dense(kvjax.LayerCache((segment,)))
    for row, head in _heads():
        n = lengths[row]
        k, v = (np.concatenate([x[row, head, :n], new[row, head]]) for x in (KEYS, VALUES))
        exact, blocks = len(k) // 16 * 16, len(k) // 16
        for block in range(blocks):
            at, age = slice(16 * block, 16 * block + 16), blocks - 1 - block
            bits = [8, 4, 2][: min(age, 2) + 1]
            arrived_in_prompt = 16 * block + 16 <= n
            if arrived_in_prompt:  # the prompt's blocks begin in the band that their age then had
                bits = [8, 4, 2][min(n // 16 - 1 - block, 2) : min(age, 2) + 1]
            for got, x, axis in ((keys[row, head, at], k[at], 0), (values[row, head, at], v[at], 1)):
                want = papers.staircase(x, bits, 16, axis)
                span = np.ptp(x, axis=axis, keepdims=True)
                same = np.abs(got - want) <= 0.03 * span
                assert same.mean() > 0.95, (row, head, block, bits)  # others were near a tie at a step
        np.testing.assert_array_equal(keys[row, head, exact : len(k)], np.float32(k[exact:]))
        assert np.isnan(keys[row, head, len(k) :]).all()


def test_bands_are_read_and_emptied_as_the_rest_is():
    layer, _ = _stored(methods.saq((8, 4, 2), (1, 1), group=16, residual=16), lengths=LENGTHS)
    cache = kvjax.Cache((layer,), jnp.int32(LENGTHS))
    assert kvjax.bytes_read(cache) == kvjax.nbytes(layer)
    odd = kvjax.reuse.without(cache, lambda pos: pos % 2 == 0)
    for row, length in enumerate(LENGTHS):
        held = kvjax.inspection.held_positions(odd, row)[0]
        assert all(head.tolist() == list(range(1, length, 2)) for head in held)


def test_vidkv():
    _, (keys, values) = _stored(methods.vidkv(0.5, group=16, residual=32), lengths=(T, T))
    for row, head in _heads():
        want, tie = papers.vidkv_keys(KEYS[row, head], 0.5, 16)
        sure = tie > NEAR
        np.testing.assert_allclose(keys[row, head, :T][sure], want[sure], rtol=0.02, atol=0.05)
        want, sure = papers.trits(VALUES[row, head], 16)
        np.testing.assert_allclose(values[row, head, :T][sure], want[sure], rtol=0.01)


def test_mustafar():
    _, (keys, values) = _stored(methods.mustafar(0.7, 0.5, recent=8))
    for row, head in _heads():
        n = LENGTHS[row] // 8 * 8
        np.testing.assert_array_equal(keys[row, head, :n], papers.mustafar(KEYS[row, head, :n], 0.7))
        np.testing.assert_array_equal(values[row, head, :n], papers.mustafar(VALUES[row, head, :n], 0.5))
        np.testing.assert_array_equal(keys[row, head, n : LENGTHS[row]], KEYS[row, head, n : LENGTHS[row]])


def test_olive():
    k = KEYS.copy()
    k[:, :, ::3, 5] *= 8  # outliers, some beside each other
    k[:, :, ::6, 4] *= 12
    _, (keys, _) = _stored(methods.olive(), k=k)
    same = []
    for row, head in _heads():
        for t in range(LENGTHS[row]):
            want = papers.olive(k[row, head, t])
            same.append(np.abs(keys[row, head, t] - want) <= 0.01 * np.abs(want) + 1e-6)
    assert np.mean(same) > 0.97  # the others lie near a tie, or two scales lose almost the same


def test_qjl():
    _, (keys, values) = _stored(methods.qjl(2.0, 3, group=16, residual=32, seed=4), lengths=(T, T))
    directions = np.float64(_orthogonal(H, 3 * H, 4))
    queries = np.random.default_rng(2).normal(size=(5, H))
    for row, head in _heads():
        want = papers.qjl_logits(queries, KEYS[row, head], directions[:, : 2 * H], directions[:, 2 * H :], 16, 3)
        np.testing.assert_allclose(queries @ keys[row, head, :T].T, want, rtol=0.02, atol=0.15)
        want, tie = papers.affine(VALUES[row, head], 2, 1)
        np.testing.assert_allclose(values[row, head, :T][tie > NEAR], want[tie > NEAR], rtol=0.02, atol=0.06)


def test_qjl_has_no_bias():
    """Over many sketches the mean of the logits is the logit."""
    k = np.float32(np.random.default_rng(5).normal(size=(1, 1, 32, H)))
    q = np.random.default_rng(6).normal(size=H)
    found = []
    for seed in range(60):
        codec = kvjax.codecs.SignSketch(None, None, None, 2.0, 2, 16, seed)
        found.append(np.asarray(codec.like(jnp.asarray(k), jnp.ones((1, 1, 32), bool)).decode())[0, 0] @ q)
    exact = k[0, 0] @ q
    assert np.abs(np.mean(found, axis=0) - exact).max() < 4 * np.std(found, axis=0).max() / 60**0.5


def test_kvquant():
    rng = np.random.default_rng(7)
    rope = Rope.from_base(100.0, H)
    low, high = -2 - rng.uniform(size=(1, K, H)), 2 + rng.uniform(size=(1, K, H))
    levels = np.sort(np.tanh(np.linspace(-1.6, 1.7, 8)))
    data = dict(key_low=low, key_high=high, key_levels3=levels, value_levels3=levels)
    method = methods.kvquant({name: jnp.float32(x) for name, x in data.items()}, 3, 0.01, sinks=2, residual=32)
    turned = np.asarray(rotate(jnp.float32(KEYS), jnp.arange(T), rope))
    observation = seen_of((T, T), prompt_slots=T)
    queries = observation.layers[0].queries._replace(rope=rope)
    observation = observation.replace(layers=(observation.layers[0].replace(queries=queries),))
    run = quick_jit(lambda cache, seen: method.init(cache, seen)[0].layers[0])
    layer = run(slots_cache(turned, (T, T), VALUES), observation)
    keys, values = _dense(layer)
    for row, head in _heads():
        n = 2 + 32  # sinks and the one block that fills
        at = slice(2, n)
        for got, x in ((keys, KEYS), (values, VALUES)):
            ends = low[0, head], high[0, head]  # of key channels; outliers are those of normalised keys
            unit = (2 * x[row, head, at] - sum(ends)) / (ends[1] - ends[0]) if got is keys else x[row, head, at]
            mark, filled = papers.without_extremes(unit)
            if got is not keys:
                ends = filled.min(axis=1, keepdims=True), filled.max(axis=1, keepdims=True)
            want, sure = papers.nonuniform(x[row, head, at], levels, *ends)
            there = (sure > 0.02) & ~mark
            close = dict(rtol=0.01, atol=0.03)
            np.testing.assert_allclose(got[row, head, at][there], want[there], **close)
            np.testing.assert_allclose(got[row, head, at][mark], x[row, head, at][mark], rtol=0.01, atol=0.03)
        np.testing.assert_allclose(values[row, head, :2], VALUES[row, head, :2], rtol=1e-6)


@pytest.mark.float8
def test_fp8_scaled():
    peaks = {"key_peak": np.abs(KEYS).max(axis=(0, 2)) / 2, "value_peak": np.abs(VALUES).max(axis=(0, 2))}
    method = methods.fp8_scaled({name: jnp.float32(x)[None] for name, x in peaks.items()})
    _, (keys, values) = _stored(method)
    for row, head in _heads():
        n, most = LENGTHS[row], peaks["key_peak"][head].max()
        clipped = np.clip(KEYS[row, head, :n], -most, most)
        large = np.abs(clipped) > most / 50
        np.testing.assert_allclose(keys[row, head, :n][large], clipped[large], rtol=2.0**-4)
        np.testing.assert_allclose(values[row, head, :n], VALUES[row, head, :n], rtol=2.0**-4, atol=0.02)


def test_palu_projects_groups_of_heads_together():
    rng = np.random.default_rng(8)
    rope, heads, g, rank = Rope.from_base(100.0, H), 4, 2, 20
    k, v = rng.normal(size=(2, 1, heads, T, H))
    axes = {name: np.linalg.qr(rng.normal(size=(heads // g, g * H, g * H)))[0] for name in ("key", "value")}
    data = {f"{name}_axes": jnp.float32(x.reshape(1, heads, H, g * H)) for name, x in axes.items()}
    method = methods.palu(data, rank, rank)
    turned = np.asarray(rotate(jnp.float32(k), jnp.arange(T), rope))
    observation = seen_of((T,), prompt_slots=T)
    queries = observation.layers[0].queries._replace(rope=rope)
    observation = observation.replace(layers=(observation.layers[0].replace(queries=queries),))
    run = quick_jit(lambda cache, seen: method.init(cache, seen)[0].layers[0].segments[-1].dense())
    dense = run(slots_cache(turned, (T,), v), observation)
    assert dense.key_rope == "at_attend"
    for got, x, basis in ((dense.k, k, axes["key"]), (dense.v, v, axes["value"])):
        for group in range(heads // g):
            of = slice(group * g, group * g + g)
            together = x[0, of].swapaxes(0, 1).reshape(T, g * H)
            columns = basis[group][:, :rank]
            want = (together @ columns @ columns.T).reshape(T, g, H).swapaxes(0, 1)
            np.testing.assert_allclose(np.asarray(got)[0, of], want, rtol=1e-4, atol=1e-4)
