"""Where the keys are the values, every method stores them once and reads what a cache that holds them twice reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods, scores, split_heads
from kvjax.observation import observe
from kvjax.segments import Segment
from tests.quick_jit import quick_jit

B, N, S, H = 2, 4, 20, 16
ROTATED = 4  # channels
LENGTHS = (20, 13)
# The first pairs of channels rotate, the others are what values are read from.
ROPE = kvjax.Rope(jnp.where(jnp.arange(H // 2) < ROTATED // 2, kvjax.Rope.from_base(100.0, H).inv_freq, 0.0))
STILL = np.r_[ROTATED // 2 : H // 2, (H + ROTATED) // 2 : H]

# Both caches hold the same keys; only what is summed in which order differs.
CLOSE = dict(rtol=1e-5, atol=1e-5)

ALIKE = {
    "evict": lambda: kvjax.evict(scores.window_attention(4), 8),
    "ring": lambda: methods.streamingllm(8, sinks=2),
    "merge": lambda: methods.d2o(8, whole=()),
    "pages": lambda: methods.adakv_snapkv(8, window=4, page=4),
    "compensated": lambda: split_heads([[]], sinks=1, recent=5, compensate=True),
}
PACKED = {
    "gear": lambda: methods.gear(4, 8, 8, rank=1, outliers=0.1),
    "balanced": lambda: methods.mikv(8, group=8, residual=8, recent=4),
}


def _cache(own_values: bool, layers: int = 1) -> kvjax.Cache:
    """A padded prompt, whose values, where it has them, are its rotated keys."""
    rng = np.random.default_rng(0)
    pos = jnp.int32(np.where(np.arange(S) < np.array(LENGTHS)[:, None], np.arange(S), -1))
    cache = kvjax.empty_cache(batch=B, layers=layers, kv_heads=1, head_dim=H, slots=0, own_values=own_values)

    def filled(layer):
        k = jnp.float32(rng.normal(size=(B, 1, S, H)))
        return layer.append(k, kvjax.rotate(k, pos[:, None], ROPE), pos, ROPE)

    return cache.map_layers(filled).replace(length=jnp.int32(LENGTHS))


def _queries(first: np.ndarray, tokens: int) -> kvjax.Queries:
    raw = np.random.default_rng(1).normal(size=(B, tokens, N, H))
    return kvjax.Queries(jnp.float32(raw), jnp.int32(first[:, None] + np.arange(tokens)), ROPE)


def _compressed(transform, cache: kvjax.Cache) -> kvjax.Cache:
    """After the prompt, and two tokens that follow."""
    lengths = np.array(LENGTHS)
    queries = _queries(lengths - 4, 4)
    key = jnp.float32(np.random.default_rng(2).normal(size=(B, 1, 2, H)))
    pos = jnp.int32(lengths[:, None] + np.arange(2))

    @quick_jit
    def run(cache):
        of_layer = lambda i, layer: observe(queries, layer.attend(queries).lse, transform.schedule.needs, jnp.int32(i))
        seen = tuple(of_layer(i, layer) for i, layer in enumerate(cache.layers))
        prompt = jnp.int32(LENGTHS)
        cache, _ = transform.init(cache, kvjax.Observation(seen, new=prompt, prompt=prompt, prompt_slots=S))
        value = kvjax.rotate(key, pos[:, None], ROPE)
        return cache.reserve(2).map_layers(lambda layer: layer.append(key, value, pos, ROPE))

    return run(cache)


@quick_jit
def _read(cache: kvjax.Cache, queries: kvjax.Queries) -> jax.Array:
    partials = [layer.attend(queries, shared=cache.shared) for layer in cache.layers]
    return jnp.stack([jnp.concatenate([p.out[..., STILL], p.lse[..., None]], axis=-1) for p in partials])


@pytest.mark.parametrize("name", ALIKE)
def test_a_cache_without_values_reads_as_one_whose_values_are_its_keys(name):
    once, twice = (_compressed(ALIKE[name](), _cache(own_values)) for own_values in (False, True))
    queries = _queries(np.array(LENGTHS) + 2, 3)
    np.testing.assert_allclose(_read(once, queries), _read(twice, queries), **CLOSE)
    vectors = lambda cache: sum(x.nbytes for x in jax.tree.leaves(cache) if x.shape[-1] == H)
    assert vectors(twice) == 2 * vectors(once) > 0


@pytest.mark.parametrize("name", PACKED)
def test_packed_keys_are_values_as_they_are_unpacked(name):
    cache, queries = _compressed(PACKED[name](), _cache(False)), _queries(np.array(LENGTHS) + 2, 3)
    unpacked = cache.map_layers(lambda layer: layer.replace(segments=tuple(s.dense() for s in layer.segments)))
    assert all(s.v is None for layer in unpacked.layers for s in layer.segments)
    np.testing.assert_allclose(_read(cache, queries), _read(unpacked, queries), **CLOSE)


def test_layers_share_coordinates_of_keys_that_are_values():
    """A basis of as many coordinates as there are tokens loses nothing."""
    cache, queries = _cache(False, layers=2), _queries(np.array(LENGTHS), 3)
    shared = _compressed(methods.xkv(2, S, 1), cache)
    assert all(segment.v is None for segment in shared.shared.values())
    prompt = shared.map_layers(lambda layer: layer.replace(segments=layer.segments[:1]))
    # The subspace iteration stops where float32 does.
    np.testing.assert_allclose(_read(prompt, queries), _read(cache, queries), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "transform",
    [methods.think(0.5, window=4), methods.minicache(0)],
    ids=["think", "minicache"],
)
def test_what_compresses_values_apart_from_keys_is_refused(transform):
    with pytest.raises(ValueError, match="the keys are the values: evict, merge or quantize"):
        _compressed(transform, _cache(False, layers=2))


def test_bytes_without_values_are_those_of_the_docstring():
    segment = Segment.empty(B, 1, S, H, jnp.bfloat16, own_values=False)
    assert kvjax.nbytes(segment) == B * S * (H * 2 + 4)
