"""The codec of docs/write_a_codec.md, as it stands there, in a ring and behind eviction."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import Queries, Ring, Rope
from tests.kvjax.slot_arrays import seen_of, slots_cache
from tests.pallas_kernels.attention_numpy import attention
from tests.quick_jit import quick_jit

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "write_a_codec.md"
K, H, S = 2, 16, 40
ROPE = Rope.from_base(100.0, H)


def _defined() -> dict:
    names = {}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_codec_of_the_page_works_in_a_ring_and_behind_eviction():
    names = _defined()
    k, v = np.random.default_rng(0).normal(size=(2, 1, K, S, H)).astype(np.float32)
    seen = seen_of([S], prompt_slots=S)
    init = quick_jit(lambda cache, seen: names["method"].init(cache, seen)[0])
    cache = init(slots_cache(k, [S], v), seen)
    ring = cache.layers[0].segments[-1]
    assert ring.layout == Ring(4) and ring.pos.shape[2] == 32  # half of the prompt, in whole words
    assert sorted(np.asarray(ring.pos)[0, 0][np.asarray(ring.pos)[0, 0] >= 0].tolist()) == [*range(4), *range(24, 40)]
    token = K * (2 * H / 8 + 2 * 4 + 4)  # signs, sizes and the position
    assert kvjax.nbytes(ring) == 32 * token
    new = jnp.float32(np.random.default_rng(1).normal(size=(2, 1, K, 1, H)))
    after = quick_jit(lambda ring, k, v: ring.append(k, v, jnp.full((1, 1), S), None))(ring, *new)
    slot = int(np.argmax(np.asarray(after.pos)[0, 0] == S))
    x = np.asarray(new)[1, 0, 0, 0]
    decoded = np.asarray(after.dense().v)
    np.testing.assert_allclose(decoded[0, 0, slot], np.where(x > 0, 1, -1) * np.abs(x).mean(), rtol=1e-6)
    others = np.arange(32) != slot
    np.testing.assert_array_equal(decoded[0, 0, others], np.asarray(ring.dense().v)[0, 0, others])
    raw = jnp.float32(np.random.default_rng(2).normal(size=(1, 1, 2 * K, H)))
    queries = Queries(raw, jnp.array([[S]]), ROPE)
    got = jax.jit(lambda part, queries: part.attend(queries))(after, queries)
    dense = after.dense()
    want = attention(queries.rotated, dense.k, dense.v, queries.pos, dense.pos)
    np.testing.assert_allclose(got.out, want.out, rtol=3e-5, atol=3e-5)
