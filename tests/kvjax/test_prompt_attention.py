"""A prompt that reads chosen blocks of its keys: what is chosen, what is computed, and that rows stay apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods, sharding
from kvjax.block_choices import Antidiagonals, Nearby
from kvjax.prompt_attention import PromptAttention, attend_blocks
from pallas_kernels.prefill_attention import prefill_attention
from tests.kvjax import tiny_model

B, T, N, K, H, BLOCK, STRIDE = 2, 28, 4, 2, 8, 8, 2  # the last block is not whole
LENGTHS = (28, 17)
CLOSE = dict(rtol=1e-5, atol=1e-5)


def _drawn(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    pos = jnp.where(jnp.arange(T) < jnp.int32(LENGTHS)[:, None], jnp.arange(T), -1)
    return draw(B, T, N, H) * 2, draw(B, K, T, H), draw(B, K, T, H), pos


def _over_keys(q, k, v, seen, row):
    """f64[T, N, H] of one row, softmax over the keys that bool[N, T, T] allows."""
    q, k, v = (np.asarray(x[row], np.float64) for x in (q, k, v))
    logits = np.einsum("tnh,nsh->nts", q, np.repeat(k, N // K, 0)) * H**-0.5
    p = np.where(seen, np.exp(logits - logits.max()), 0.0)
    return np.einsum("nts,nsh->tnh", p / p.sum(-1, keepdims=True), np.repeat(v, N // K, 0))


def _antidiagonal_blocks(q, k, length, tau):
    """The blocks of one row, as the paper's text says: a set for every head and block of queries."""
    q, k = np.asarray(q, np.float64), np.repeat(np.asarray(k, np.float64), N // K, 0)
    tiles = -(-length // STRIDE)
    logit = np.zeros((N, tiles, tiles))
    for n, t, s, i in np.ndindex(N, tiles, tiles, STRIDE):
        at, key = t * STRIDE + STRIDE - 1 - i, s * STRIDE + i
        if at < length and key < length:
            logit[n, t, s] += q[at, n] @ k[n, key] / (H**0.5 * STRIDE)
    causal = np.tril(np.ones((tiles, tiles)))
    p = np.exp(logit) * causal
    p /= p.sum(-1, keepdims=True)
    per = BLOCK // STRIDE
    chosen = {}
    for n, i in np.ndindex(N, -(-length // BLOCK)):
        share = [p[n, i * per : (i + 1) * per, j * per : (j + 1) * per].sum() for j in range(i + 1)]
        blocks, reached = {0, i}, sum(share[j] for j in {0, i})
        for j in sorted(range(1, i), key=lambda j: -share[j]):
            if reached < tau * sum(share):
                blocks.add(j)
                reached += share[j]
        chosen[n, i] = blocks
    return chosen


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_every_block_is_dense_attention(window):
    drawn = _drawn()
    expected = prefill_attention(*drawn, window=window)
    for choose in (Antidiagonals(STRIDE, 1.0), Nearby(group=1, previous=9)):
        got = PromptAttention(choose, BLOCK)(*drawn, window=window)
        jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), got, expected)


@pytest.mark.parametrize("tau", [0.5, pytest.param(0.8, marks=pytest.mark.slow)])
def test_antidiagonals_choose_as_the_paper_says_and_only_that_is_read(tau):
    q, k, v, pos = _drawn()
    attention = PromptAttention(Antidiagonals(STRIDE, tau), BLOCK)
    index = np.asarray(attention.blocks(q, k, pos).index)
    out = np.asarray(attention(q, k, v, pos).out)
    read = 0
    for row, length in enumerate(LENGTHS):
        seen = np.zeros((N, T, T), bool)
        for (n, i), blocks in _antidiagonal_blocks(q[row], k[row], length, tau).items():
            assert {int(j) for j in index[row, n, i] if j >= 0} == blocks
            read += len(blocks)
            for j in blocks:
                seen[n, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = True
        seen = (seen & np.tril(np.ones((T, T), bool)))[:, :length, :length]
        real = [x[:, :length] if x.shape[1] == T else x[:, :, :length] for x in (q, k, v)]
        np.testing.assert_allclose(out[row, :length], _over_keys(*real, seen, row), **CLOSE)
    assert read == np.sum(index >= 0) < N * (10 + 6)  # padding chooses nothing


@pytest.mark.parametrize(
    "choose", [Antidiagonals(STRIDE, 0.5), pytest.param(Nearby(group=1, previous=0), marks=pytest.mark.slow)]
)
def test_a_padded_row_is_its_own_run_and_every_query_sees_itself(choose):
    q, k, v, pos = _drawn()
    attention = PromptAttention(choose, BLOCK)
    together = attention(q, k, v, pos)
    n = LENGTHS[1]
    alone = attention(q[1:, :n], k[1:, :, :n], v[1:, :, :n], pos[1:, :n])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1:, :n], y, **CLOSE), together, alone)
    assert np.all(np.isneginf(together.lse[1, n:])) and not np.any(together.out[1, n:])
    blocks = attention.blocks(q, k, pos)
    own = np.any(np.asarray(blocks.index) == np.arange(4)[None, None, :, None], axis=-1)
    assert own[0].all() and own[1, :, :3].all()
    assert not np.any(blocks.cut)


def test_what_finds_no_place_is_counted():
    q, k, _, pos = _drawn()
    half = PromptAttention(Antidiagonals(STRIDE, 1.0), BLOCK, most=0.5).blocks(q, k, pos)
    assert half.index.shape == (B, N, 4, 2)
    np.testing.assert_array_equal(half.cut[0, 0], [0, 0, 1, 2])
    np.testing.assert_array_equal(half.cut[1, 0], [0, 0, 1, 0])
    assert np.all(half.index[0, :, 3] == jnp.array([0, 3]))  # of equal ones the earlier


def test_a_group_reads_those_before_it_and_the_last_reads_everything():
    pos = jnp.arange(8)[None]
    near = PromptAttention(Nearby(group=2, previous=1, first=1), 1)
    blocks = near.blocks(jnp.zeros((1, 8, 1, 2)), jnp.zeros((1, 1, 8, 2)), pos)
    read = [[int(j) for j in row if j >= 0] for row in blocks.index[0, 0]]
    assert read[:6] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 2, 3, 4, 5]]
    assert read[6:] == [list(range(7)), list(range(8))]


def test_a_turn_of_the_loop_computes_one_block_of_keys():
    """The compiler counts the body of a loop once: 4 H FLOPs for every pair of a block, however long the prompt."""
    flops = []
    for count in (4, 8):
        block, heads, width = 128, 2, 64
        array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        kv = array(1, heads, count * block, width)
        args = array(1, count * block, heads, width), kv, kv, int32(1, count * block), int32(1, heads, count, count)
        program = jax.jit(functools.partial(attend_blocks, block=block)).lower(*args).compile()
        flops.append(program.cost_analysis()["flops"])
    one = 4 * width * heads * block**2
    assert one < flops[0] < 1.2 * one and flops[1] == pytest.approx(flops[0], rel=0.02)


def test_it_composes_and_two_in_a_chain_are_refused():
    tokens, step = tiny_model.prompt(1, 40), tiny_model.bind(tiny_model.params())
    read = lambda transform: kvjax.prefill(step, transform, tokens, jnp.array([40]), tiny_model.empty(1), room=4)
    packed = kvjax.quantize(4, key_group=8, value_group=8, residual=8)
    dense = read(packed)
    few = read(kvjax.chain(methods.xattention(0.1, stride=2, block=8), packed))
    assert jax.tree.structure(few.cache) == jax.tree.structure(dense.cache)
    assert np.max(np.abs(few.logits - dense.logits)) > 1e-4
    with pytest.raises(ValueError, match="attends to itself in one way"):
        kvjax.chain(methods.xattention(0.9), methods.xattention(0.8))
    assert kvjax.chain(methods.xattention(0.9), methods.xattention(0.9)).schedule.needs.prompt_attention is not None


def test_a_mesh_that_splits_tokens_is_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("seq",))
    drawn = (x[..., :24, :] if x.ndim == 4 and x.shape[1] == K else x[:, :24] for x in _drawn())
    with sharding.use_mesh(mesh):
        with pytest.raises(ValueError, match="splits its tokens in 2"):
            sharding.attend_new(*drawn, prompt=PromptAttention(Nearby(), BLOCK))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: methods.xattention(0.0), "tau must be in"),
        (lambda: methods.xattention(stride=3), "stride must be at least 1 and divide"),
        (lambda: methods.xattention(most=0.0), "most must be in"),
        (lambda: methods.videoxl2(group=100), "group must be a positive multiple"),
        (lambda: methods.videoxl2(first=1), "first must be a multiple"),
        (lambda: methods.videoxl2(previous=-1), "previous must be at least 0"),
        (lambda: kvjax.attend_prompt(Nearby(), block=0), "block must be at least 1"),
    ],
)
def test_impossible_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
