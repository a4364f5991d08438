"""Prompts that read single keys and diagonals beside blocks: what is chosen, and that nothing is counted twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import line_choices, methods, sharding
from kvjax.block_choices import Antidiagonals
from kvjax.line_choices import ByPattern, Corner, Important, Lines, PooledBlocks
from kvjax.methods.minference import pattern
from kvjax.probes import probe_salience
from kvjax.prompt_attention import PromptAttention, attend_blocks
from pallas_kernels.prefill_attention import prefill_attention
from tests.kvjax import papers_of_prompts as papers
from tests.kvjax import tiny_model
from tests.quick_jit import quick_jit

B, T, N, K, H, BLOCK = 2, 44, 4, 2, 8, 4
LENGTHS = (44, 29)  # the second ends within a block
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def few_always(monkeypatch):
    """At 44 tokens, 30 lines that are always read would be all there are."""
    monkeypatch.setattr(line_choices, "_ALWAYS", 3)


def _drawn(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    pos = jnp.where(jnp.arange(T) < jnp.int32(LENGTHS)[:, None], jnp.arange(T), -1)
    return draw(B, T, N, H) * 2, draw(B, K, T, H), draw(B, K, T, H), pos


def _run(attention, *arrays, **how):
    return quick_jit(lambda *arrays: attention(*arrays, **how))(*arrays)


def _over_keys(q, k, v, seen):
    """f64[T, N, H] of one row, softmax over the keys that bool[N, T, T] allows."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("tnh,nsh->nts", q, np.repeat(k, N // K, 0)) * H**-0.5
    p = np.where(seen, np.exp(logits - logits.max()), 0.0)
    return np.einsum("nts,nsh->tnh", p / p.sum(-1, keepdims=True), np.repeat(v, N // K, 0))


CHOICES = {
    "corner": (Corner(5, 6), lambda q, k: papers.a_shape(len(q), N, 5, 6, BLOCK)),
    "lines": (Lines(8, 5, probes=7), lambda q, k: papers.vertical_slash(q, k, 8, 5, 7, 3, BLOCK)),
    "pooled": (PooledBlocks(3), lambda q, k: papers.pooled_blocks(q, k, 3, BLOCK)),
    "important": (Important(0.6, 9), lambda q, k: papers.zipvl_prompt(q, k, 0.6, 9, BLOCK)),
}


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("corner", "pooled")]


@pytest.mark.parametrize("name", ["lines", "important", *_SLOW])
def test_a_prompt_reads_what_its_paper_says_once_and_a_row_does_not_depend_on_others(name):
    choose, expected = CHOICES[name]
    q, k, v, pos = _drawn()
    attention = PromptAttention(choose, BLOCK)
    together = _run(attention, q, k, v, pos)
    left_out = 0
    for row, n in enumerate(LENGTHS):
        own = q[row, :n], np.repeat(k[row, :, :n], N // K, 0)
        seen = expected(*(np.asarray(x, np.float64) for x in own))
        assert np.all(np.diagonal(seen, axis1=1, axis2=2))  # every query sees itself
        left_out += np.sum(np.tril(np.ones((N, n, n))) > seen)
        read = _over_keys(q[row, :n], k[row, :, :n], v[row, :, :n], seen)
        np.testing.assert_allclose(together.out[row, :n], read, **CLOSE)
    assert left_out > 500
    n = LENGTHS[1]
    alone = _run(attention, q[1:, :n], k[1:, :, :n], v[1:, :, :n], pos[1:, :n])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1:, :n], y, **CLOSE), together, alone)
    assert np.all(np.isneginf(together.lse[1, n:])) and not np.any(together.out[1, n:])
    later = _run(attention, q, k, v, jnp.where(pos < 0, -1, pos + 100))  # behind what was read before
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), later, together)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 5])
def test_everything_chosen_is_dense_attention(window):
    drawn = _drawn()
    expected = prefill_attention(*drawn, window=window)
    everything = [Lines(T, 3), Important(1.0, 4)]
    if window is None:
        everything += [Corner(3, T), Lines(T, T), PooledBlocks(T)]
    for choose in everything:
        got = _run(PromptAttention(choose, BLOCK), *drawn, window=window)
        jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), got, expected)


def test_a_column_is_read_once_wherever_it_lies():
    """Columns in a chosen block, in the block of the queries, ahead of them and alone; more than a tile of them."""
    q, k, v, pos = (x[:1] for x in _drawn())
    count = T // BLOCK
    index = np.full((1, N, count, 3), -1, np.int32)
    for i in range(count):
        blocks = sorted({i, max(i - 4, 0), i // 2})
        index[:, :, i, : len(blocks)] = blocks
    places = np.array([0, 1, 5, 9, 10, 11, 20, 41, 43, -1])
    columns = jnp.broadcast_to(jnp.int32(places), (1, N, len(places)))
    got = _run(attend_blocks, q, k, v, pos, jnp.asarray(index), columns, block=BLOCK)
    at = np.arange(T)
    seen = (index[0][:, at // BLOCK][:, :, :, None] == at // BLOCK).any(2) | np.isin(at, places)
    seen &= at[:, None] >= at
    np.testing.assert_allclose(got.out[0], _over_keys(q[0], k[0], v[0], seen), **CLOSE)


@pytest.mark.slow
def test_every_head_of_every_layer_has_its_own_pattern():
    q, k, v, pos = _drawn()
    choices = Corner(5, 6), Antidiagonals(2, 0.3), Lines(8, 5, probes=7)
    patterns = (0, 2, 1, 0), (2, 2, 2, 1)
    mixed = PromptAttention(ByPattern(choices), BLOCK, patterns=patterns)
    each = [_run(PromptAttention(choice, BLOCK), q, k, v, pos).out for choice in choices]
    for layer, of in enumerate(patterns):
        got = _run(mixed, q, k, v, pos, mixed.of_layer(jnp.int32(layer), N)).out
        for head, number in enumerate(of):
            np.testing.assert_allclose(got[:, :, head], each[number][:, :, head], **CLOSE)
    with pytest.raises(ValueError, match="of the layer's 5 query heads, got 4"):
        mixed.of_layer(0, 5)


@pytest.mark.slow
def test_a_calibration_names_the_pattern_of_each_head_of_a_decoder():
    tokens, step = tiny_model.prompt(1, 40), tiny_model.bind(tiny_model.params())
    L, N = tiny_model.CONFIG.num_layers, tiny_model.CONFIG.num_heads
    candidates = jnp.float32([[0, 2, 4], [1, 30, 50], [2, 1, 0], [0, 40, 40]])
    build = lambda of: methods.minference({"candidates": candidates, "pattern": jnp.float32(of)}, block=4)
    read = lambda transform: kvjax.prefill(step, transform, tokens, jnp.array([40]), tiny_model.empty(1), room=4).logits
    dense = read(methods.full())
    np.testing.assert_allclose(read(build(np.full((L, N), 3))), dense, rtol=1e-4, atol=1e-4)
    first_alone = np.full((L, N), 3)
    first_alone[0] = 0
    assert np.max(np.abs(read(build(first_alone)) - dense)) > 1e-4
    with pytest.raises(ValueError, match=f"patterns must be of all {L} layers, got 1"):
        read(build(first_alone[:1]))


@pytest.mark.slow
def test_the_saliency_of_the_prompt_decides_what_has_more_bits():
    """The tokens that a layer's prompt reads and those it stores with more bits are the most salient, in one order."""
    q, k, _, pos = _drawn()
    attention = PromptAttention(Important(0.6, 9), BLOCK)
    columns = np.asarray(attention.blocks(q, k, pos).columns)
    segment = kvjax.Segment.empty(B, K, 0, H, jnp.float32)
    zero = kvjax.Rope(jnp.zeros(H // 2))
    segment = segment.append(k, k, pos, zero)
    queries = kvjax.Queries(q, pos, zero)
    seen = kvjax.LayerObservation(queries, jnp.zeros((B, T, N)), jnp.int32(0))
    scores = np.asarray(probe_salience(9).score(segment, seen))
    for row, n in enumerate(LENGTHS):
        read = columns[row, 0][columns[row, 0] >= 0]
        order = np.argsort(-scores[row, 0, :n], kind="stable")
        assert 3 < len(read) < n - 3 and set(read) == set(order[: len(read)])


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: methods.minference(columns=29), "columns must be at least 30 and diagonals at least 50, got 29"),
        (lambda: methods.minference(block=0), "block must be at least 1"),
        (lambda: pattern(3, 1, 1), "kind must be 0, 1 or 2, got 3"),
        (
            lambda: methods.minference({"candidates": jnp.zeros((1, 3)), "pattern": jnp.ones((2, 4))}),
            "pattern must be from 0 to 0, got 1",
        ),
        (lambda: methods.zipvl(tau=1.5), "tau must be in"),
        (lambda: methods.zipvl(probes=0), "probes must be at least 1"),
    ],
)
def test_impossible_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
def test_a_mesh_that_splits_heads_gives_each_its_pattern():
    q, k, v, pos = _drawn()
    prompt = PromptAttention(ByPattern((Corner(5, 6), PooledBlocks(2))), BLOCK, patterns=((0, 1, 1, 0), (1, 1, 0, 1)))
    run = lambda *arrays: sharding.attend_new(*arrays, prompt=prompt, layer=jnp.int32(1))
    expected = _run(run, q, k, v, pos)
    with sharding.use_mesh(jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))):
        got = _run(run, q, k, v, pos)
    assert len(got.out.devices()) == 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), got, expected)
