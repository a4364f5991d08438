"""Methods that share slots between layers, against their papers' steps in NumPy, and what they cost in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from models.weights import abstract_params
from tests.kvjax import papers, tiny_model
from tests.quick_jit import quick_jit

B, L, K, G, S, H = 2, 5, 2, 2, 20, 8
LENGTHS = (20, 13)
ROPE = kvjax.Rope.from_base(100.0, H)

# float32 against float64, on numbers of order one; the subspace iteration stops short of the exact one.
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def prompt():
    """The cache of a padded prompt of five layers, and un-rotated keys and values f64[L, B, K, S, H] of them.

    Singular values of a group fall by 0.6 from one to the next; neighbouring layers resemble each other.
    """
    rng = np.random.default_rng(0)
    pos = np.where(np.arange(S) < np.array(LENGTHS)[:, None], np.arange(S), -1)
    decaying = lambda: rng.normal(size=(B, S, 16)) * 0.6 ** np.arange(16) @ rng.normal(size=(16, L * K * H))
    k, v = (decaying().reshape(B, S, L, K, H).transpose(2, 0, 3, 1, 4) for _ in range(2))
    k, v = (np.where(pos[:, None, :, None] < 0, 1e3, x) for x in (k, v))  # padding is not to be seen
    cache = kvjax.empty_cache(batch=B, layers=L, kv_heads=K, head_dim=H, slots=0)
    layers = [
        layer.append(jnp.float32(k[i]), jnp.float32(v[i]), jnp.int32(pos), ROPE) for i, layer in enumerate(cache.layers)
    ]
    return cache.replace(layers=tuple(layers), length=jnp.array(LENGTHS)), k, v


def _compressed(transform, cache):
    queries = kvjax.Queries(jnp.zeros((B, 1, K * G, H)), jnp.zeros((B, 1), jnp.int32), ROPE)
    seen = tuple(kvjax.LayerObservation(queries, None, jnp.int32(i)) for i in range(L))
    lengths = jnp.array(LENGTHS)
    seen = kvjax.Observation(seen, new=lengths, prompt=lengths, prompt_slots=S)
    return quick_jit(lambda cache, seen: transform.init(cache, seen)[0])(cache, seen)


def _queries():
    raw = np.random.default_rng(1).normal(size=(B, 2, K * G, H))
    pos = np.array(LENGTHS)[:, None] + np.arange(2)
    return kvjax.Queries(jnp.float32(raw), jnp.int32(pos), ROPE)


@quick_jit
def _lse_and_mass(segment, queries):
    """Of a segment, and of the dense slots that it stands for."""
    dense, lse = segment.dense(), segment.attend(queries).lse
    return (lse, segment.mass(queries, lse)), (dense.attend(queries).lse, dense.mass(queries, lse))


@quick_jit
def _read(cache, queries):
    return [layer.attend(queries, shared=cache.shared).out for layer in cache.layers]


def _attention(q, k, v):
    """f64[N, H] of one row's queries f64[N, H] over rotated keys and values f64[K, n, H]."""
    out = []
    for n, query in enumerate(q):
        logits = k[n // G] @ query / np.sqrt(H)
        weights = np.exp(logits - logits.max())
        out.append(weights / weights.sum() @ v[n // G])
    return np.stack(out)


def _check_reads(cache, keys, values, tolerance=CLOSE):
    """Every layer of the cache attends as over these rotated keys and values, [layer][row][K, n, H]."""
    queries = _queries()
    for i, out in enumerate(_read(cache, queries)):
        for row in range(B):
            for t in range(2):
                want = _attention(np.asarray(queries.rotated[row, t], np.float64), keys[i][row], values[i][row])
                np.testing.assert_allclose(out[row, t], want, **tolerance)


def _turn(k):
    """Rotates f64[K, n, H] at positions 0 .. n - 1."""
    half = np.exp(1j * np.arange(k.shape[-2])[:, None] * 100.0 ** (-np.arange(H // 2) / (H // 2)))
    z = (k[..., : H // 2] + 1j * k[..., H // 2 :]) * half
    return np.concatenate([z.real, z.imag], axis=-1)


def test_xkv_reads_the_singular_value_decomposition_of_each_group(prompt):
    cache, k, v = prompt
    small = _compressed(methods.xkv(2, 6, 0.25), cache)
    assert list(small.shared) == ["layers 0 to 1", "layers 2 to 3", "layers 4 to 4"]
    keys, values = ([[None] * B for _ in range(L)] for _ in range(2))
    for row, n in enumerate(LENGTHS):
        for group in ((0, 1), (2, 3), (4,)):
            cut = lambda x, rank: papers.xkv([x[i][row, :, :n] for i in group], rank)
            for i, of_keys, of_values in zip(group, cut(k, 6), cut(v, int(0.25 * len(group) * K * H))):
                keys[i][row], values[i][row] = _turn(of_keys), of_values
    _check_reads(small, keys, values, dict(rtol=2e-2, atol=2e-2))
    for i, layer in enumerate(small.inlined().layers):
        slots = layer.segments[0].dense()
        for row, n in enumerate(LENGTHS):
            error = lambda got, want: np.linalg.norm(got - want) / np.linalg.norm(want)
            exact = [x[i][row, :, :n] for x in (k, v)]
            assert error(_turn(slots.k[row, :, :n]), keys[i][row]) < 5e-3
            assert error(slots.v[row, :, :n], values[i][row]) < 5e-3
            assert error(slots.v[row, :, :n], exact[1]) > 5e-3  # it did lose something


def test_minicache_reads_merged_directions_and_retains_what_differs_most(prompt):
    cache, k, v = prompt
    small = _compressed(methods.minicache(0.2, 0.3, interpolation=0.6), cache)
    assert list(small.shared) == ["layers 1 and 2", "layers 3 and 4"]
    keys = [[_turn(k[i, row, :, :n]) for row, n in enumerate(LENGTHS)] for i in range(L)]
    values = [[v[i, row, :, :n].copy() for row, n in enumerate(LENGTHS)] for i in range(L)]
    for first in (1, 3):
        pair = first, first + 1
        for row, n in enumerate(LENGTHS):
            for head in range(K):
                at = lambda x: [x[i][row][head] for i in pair]
                exact, new_keys, new_values = papers.minicache(at(keys), at(values), int(0.3 * n), 0.6)
                for i, key, value in zip(pair, new_keys, new_values):
                    tail = small.layers[i].segments[-1].pos[row, head]
                    assert sorted(tail[tail >= 0].tolist()) == exact
                    keys[i][row][head], values[i][row][head] = key, value
    _check_reads(small, keys, values)
    dense = small.inlined().layers[1].segments[0].dense()
    there = np.asarray(dense.pos[0, 0])
    np.testing.assert_allclose(dense.k[0, 0][there >= 0], keys[1][0][0][there[there >= 0]], **CLOSE)


@pytest.mark.parametrize("other", ["equal", "opposite", "zero"])
def test_directions_without_an_arc_are_merged_to_something_finite(prompt, other):
    cache, _, _ = prompt
    factor = {"equal": 2.0, "opposite": -1.0, "zero": 0.0}[other]
    twin = cache.layers[0].segments[-1]
    twin = twin.replace(k=factor * twin.k, v=factor * twin.v)
    cache = cache.replace(layers=(cache.layers[0], cache.layers[0].with_tail(twin), *cache.layers[2:]))
    small = _compressed(methods.minicache(0, 0), cache)
    for got, want, _ in zip(_read(small, _queries()), _read(cache, _queries()), range(2)):
        assert jnp.isfinite(got).all()
        if other == "equal":
            np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("packed", ["dense", "int8"])
def test_mass_is_that_of_the_expanded_slots(prompt, packed):
    queries = _queries()
    for method in (methods.xkv(2, 8, 8), methods.minicache(0.2, 0.3)):
        small = _compressed(method, prompt[0])
        if packed == "int8":
            small = _compressed(kvjax.quantize(8, key_group=4, value_group=4, residual=4), small)
        segment = small.inlined().layers[1].segments[0]
        (lse, mass), (dense_lse, dense_mass) = _lse_and_mass(segment, queries)
        np.testing.assert_allclose(lse, dense_lse, **CLOSE)
        np.testing.assert_allclose(mass, dense_mass, **CLOSE)


def test_quantizing_what_is_shared_counts_once(prompt):
    for method in (methods.xkv(2, 8, 8), methods.minicache(0.2, 0.3)):
        small = _compressed(method, prompt[0])
        packed = _compressed(kvjax.quantize(4, key_group=8, value_group=8, residual=8), small)
        assert kvjax.nbytes(packed.shared) < 0.5 * kvjax.nbytes(small.shared)
        views = lambda cache: [layer.segments[0] for layer in cache.layers if len(layer.segments) > 1]
        assert kvjax.nbytes(views(packed)) == kvjax.nbytes(views(small))  # bases and lengths stay


@pytest.mark.parametrize("method", [methods.xkv(2), methods.minicache(0)])
def test_a_prefill_holds_dense_keys_and_values_of_one_group_whatever_the_number_of_layers(method):
    T = 1024
    dense_layer = 2 * 4 * T * tiny_model.CONFIG.num_kv_heads * tiny_model.CONFIG.head_dim

    def peak(layers):
        config = dataclasses.replace(tiny_model.CONFIG, num_layers=layers)

        def program(params, tokens, lengths, cache):
            return kvjax.prefill(tiny_model.bind(params, config), method, tokens, lengths, cache, room=8)

        cache = jax.eval_shape(lambda: tiny_model.empty(1, config))
        params = abstract_params(config, jnp.float32)
        int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        compiled = quick_jit(program).lower(params, int32(1, T), int32(1), cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes  # beside the compressed cache, which is the result

    assert peak(8) - peak(4) < dense_layer
