"""MiKV against the paper's steps in NumPy: which tokens have which bits, and what their codes stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from tests.kvjax import table_decoder
from tests.kvjax.encoders import affine
from tests.pallas_kernels.kivi_numpy import kivi_quantizer
from tests.quick_jit import quick_jit

TABLES = table_decoder.tables()
STEP = table_decoder.decoder(TABLES)
T, LENGTHS, BUDGET, GROUP, GROUPED = 40, (40, 27), 12, 4, table_decoder.GROUP
TOKENS = np.stack([np.random.default_rng(100 + row).permutation(table_decoder.VOCAB)[:T] for row in range(2)])


@functools.cache
def _run(transform_of, chunk=None) -> kvjax.Run:
    program = lambda prompt, cache: kvjax.prefill(
        STEP, transform_of(), prompt, jnp.array(LENGTHS), cache, room=8, chunk=chunk
    )
    return quick_jit(program)(jnp.int32(TOKENS), table_decoder.empty(2))


def _mikv():
    return methods.mikv(BUDGET, recent=0.5, group=GROUP, residual=8)


def _head(row: int, layer: int, head: int):
    """Rotated queries [G, n, H] and keys, and values [n, H] of one KV head, in float64."""
    tokens = TOKENS[row, : LENGTHS[row]]
    at = np.arange(len(tokens))
    mine = np.s_[head * GROUPED : (head + 1) * GROUPED]
    q, k, v = (x[layer, tokens].astype(np.float64) for x in TABLES)
    return table_decoder.turn(q[:, mine].swapaxes(0, 1), at), table_decoder.turn(k[:, head], at), v[:, head]


def _important(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """H2O: the newest half of the budget, and the others with most accumulated attention."""
    n = len(k)
    logits = np.where(np.tri(n, dtype=bool), q @ k.T / np.sqrt(k.shape[-1]), -np.inf)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    score = (p / p.sum(axis=-1, keepdims=True)).sum(axis=1).mean(axis=0)
    old = n - BUDGET // 2
    return np.sort([*np.argsort(-score[:old])[: BUDGET - BUDGET // 2], *range(old, n)])


@pytest.mark.parametrize("chunk", [None, 9])
def test_the_heaviest_tokens_have_eight_bits_and_the_others_two(chunk):
    run = _run(_mikv, chunk)
    for layer in range(table_decoder.LAYERS):
        others, important = run.cache.layers[layer].segments
        assert others.latent.k.bits == 2 and important.body.k.bits == 8
        for row in range(2):
            for head in range(table_decoder.KV_HEADS):
                q, k, v = _head(row, layer, head)
                kept = _important(q, k)
                held = lambda pos: sorted(np.asarray(pos)[row, head][np.asarray(pos)[row, head] >= 0].tolist())
                assert held(important.pos) == kept.tolist()
                assert held(others.pos) == sorted(set(range(len(k))) - set(kept.tolist()))


def test_codes_of_the_others_stand_for_what_the_paper_stores():
    run = _run(_mikv)
    off = []
    for layer in range(table_decoder.LAYERS):
        segment = run.cache.layers[layer].segments[0]
        dense = segment.dense()
        for row in range(2):
            for head in range(table_decoder.KV_HEADS):
                q, k, v = _head(row, layer, head)
                balance = np.sqrt(np.abs(q).max(axis=(0, 1)) / np.abs(k).max(axis=0))
                np.testing.assert_allclose(segment.key_basis.factor[row, head], balance, rtol=1e-5)
                pos = np.asarray(dense.pos[row, head])
                at = pos[pos >= 0]
                stored = lambda x: kivi_quantizer(x[None, None, at], 2, GROUP, axis=3)[1][0, 0]
                want = stored(k * balance) / balance, stored(v)
                for got, want, scale in zip((dense.k, dense.v), want, (balance, 1.0)):
                    off.append(np.abs((np.asarray(got)[row, head][pos >= 0] - want) * scale).ravel())
    # Scales are bfloat16, rounded outwards: a hundredth of a range of about four, but for codes that round otherwise.
    off = np.concatenate(off)
    assert np.quantile(off, 0.9) < 0.06 and off.max() < 4.0


@pytest.mark.parametrize("where", ["tail", "written"])
def test_a_split_and_a_balance_by_themselves_change_nothing(where):
    def balanced():
        split = kvjax.split_slots(kvjax.scores.accumulated_attention(), BUDGET, sinks=1, recent=2)
        balance = kvjax.balance_channels(where)
        return kvjax.at_prefill_end(kvjax.chain(split, balance) if where == "written" else balance)

    extend = lambda transform: quick_jit(
        lambda run, new: kvjax.extend(STEP, transform, run, new, jnp.full(2, 3))[1]
    )
    new = jnp.int32(TOKENS[:, :3])
    got = extend(balanced())(_run(balanced), new)
    np.testing.assert_allclose(got, extend(methods.full())(_run(methods.full), new), rtol=3e-5, atol=3e-5)


def test_the_balancer_helps_keys_with_outlier_channels():
    rng = np.random.default_rng(0)
    B, K, S, H = 1, 2, 64, 16
    k = rng.normal(size=(B, K, S, H)) * np.where(np.arange(H) % 8 == 3, 20.0, 1.0)
    q = rng.normal(size=(B, 32, K, H)) * np.where(np.arange(H) % 8 == 3, 0.1, 1.0)
    slots = kvjax.Segment.of(
        k=jnp.float32(k), v=jnp.zeros((B, K, S, H)), pos=jnp.tile(jnp.arange(S), (B, K, 1)), key_rope="stored"
    )
    factor = jnp.float32(np.sqrt(np.abs(q).max(axis=1) / np.abs(k).max(axis=2)))
    encode = lambda x: affine(x, bits=2, key_group=8, value_group=8, key_axis="token")
    balanced = kvjax.LatentSegment.of(slots, kvjax.segments.bases.Scales(factor), None).map_dense(encode, encode)
    logits = lambda x: np.einsum("btkh,bksh->bkts", q, np.asarray(x))
    error = [np.square(logits(part.dense().k) - logits(k)).mean() for part in (encode(slots), balanced)]
    assert error[1] < 0.5 * error[0]


def test_what_snapkv_chooses_does_not_depend_on_what_follows_wanting_more_queries():
    snapkv = lambda: methods.snapkv(20, window=4, kernel=3)
    alone = _run(snapkv)
    both = _run(lambda: kvjax.chain(snapkv(), methods.mikv(8, group=GROUP, residual=8)))
    for a, b in zip(alone.cache.layers, both.cache.layers):
        pos = jnp.concatenate([part.pos for part in b.segments], axis=-1)
        for row in range(2):
            for head in range(table_decoder.KV_HEADS):
                held = lambda x: sorted(x[row, head][x[row, head] >= 0].tolist())
                assert held(np.asarray(a.segments[-1].pos)) == held(np.asarray(pos))
    assert kvjax.nbytes(jax.eval_shape(lambda: both.cache)) < kvjax.nbytes(alone.cache)
