"""What the papers of reuse compute on the host, and anchors, against numbers by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from experiments import ets
from kvjax.reuse import batchllm, cachecraft, kvcomm, vattention
from kvjax.segments import Segment


def test_prompts_are_grouped_where_that_saves_most():
    """Nine tokens of three and four of two beat three of all five; one that begins otherwise is alone."""
    a, b = list(range(10)), [0, 1, 2, 50, 51]
    prompts = [[*a, 20], [*b, 21], [*a, 22], [7], [*b, 23], [*a[:9], 30, 31]]
    groups = batchllm.prefix_groups(prompts)
    assert sorted(groups) == [((0, 2, 5), 9), ((1, 4), 5), ((3,), 0)]
    assert [group.saved for group in sorted(groups)] == [18, 5, 0]
    order = batchllm.reading_order(groups, prompts, [1, 1, 1, 100, 50, 1])
    assert [group.rows for group in order] == [(3,), (1, 4), (0, 2, 5)]


def test_a_prompt_keeps_its_last_token_for_itself():
    assert batchllm.prefix_groups([[1, 2, 3], [1, 2, 3]]) == [((0, 1), 2)]
    assert batchllm.prefix_groups([[1, 2, 3], [1, 2, 3]], least=3) == [((0,), 0), ((1,), 0)]
    with pytest.raises(ValueError, match="at least 1 token"):
        batchllm.prefix_groups([[1], []])


def test_a_chunk_is_read_again_as_far_as_it_looked_at_others():
    """Two chunks of two tokens; the second gives 0.6 and 0.2 of its attention to the first."""
    attention = np.zeros((1, 4, 4))
    attention[0] = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.3, 0.3, 0.4, 0], [0.1, 0.1, 0.4, 0.4]]
    first, second = cachecraft.chunk_scores(attention, ["a", "b"], [2, 2])
    np.testing.assert_allclose(second.inter, [0.8])
    np.testing.assert_allclose(second.tokens, [0.6, 0.2])
    impact = 1 / (1 + np.exp(-(0.8 / 4) / (1.2 / 4)))
    np.testing.assert_allclose(second.impact, impact)
    assert cachecraft.recomputed_fraction(first, ["x"]) == 0
    assert cachecraft.recomputed_fraction(second, ["a"]) == 0
    np.testing.assert_allclose(cachecraft.recomputed_fraction(second, ["x"]), impact)
    assert cachecraft.recomputed_tokens(second, ["x"]).tolist() == [0, 1]
    assert cachecraft.recomputed_tokens(second, ["x"], alpha=0.5).tolist() == [0]
    with pytest.raises(ValueError, match="lengths must be of the 1 names and 4 together"):
        cachecraft.chunk_scores(attention, ["a"], [3])


def test_the_order_of_chunks_counts():
    scores = cachecraft.ChunkScores(("a", "b", "c"), np.array([1.0, 1.0, 2.0]), 0.6, np.ones(4))
    np.testing.assert_allclose(cachecraft.recomputed_fraction(scores, ["a", "b", "c"]), 0)
    np.testing.assert_allclose(cachecraft.recomputed_fraction(scores, ["b", "a", "c"]), 0.6 / 3)
    np.testing.assert_allclose(cachecraft.recomputed_fraction(scores, ["c"]), 0.6 / 2)


def _text(seed, change=0.0):
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(2):
        k, v = (jnp.float32(rng.normal(size=(1, 2, 3, 4)) + change) for _ in range(2))
        layers.append(kvjax.LayerCache((Segment.of(k, v, jnp.broadcast_to(jnp.arange(3), (1, 2, 3))),)))
    return kvjax.Cache(tuple(layers), jnp.array([3]))


def test_anchors_correct_a_text_by_what_happened_to_texts_like_it():
    """An anchor of the same text decides alone where the other is far away; the first layer stays."""
    text, same, far = _text(0), kvcomm.Anchor(_text(0), _text(0, 0.5)), kvcomm.Anchor(_text(1, 99.0), _text(1, 0.0))
    assert kvcomm.reusable(text, [same, far]) and not kvcomm.reusable(text, [same])
    assert not kvcomm.reusable(text, [same, same])
    got = kvcomm.corrected(text, [same, far])
    for field in ("k", "v"):
        old, new = ([getattr(layer.segments[0], field) for layer in cache.layers] for cache in (text, got))
        np.testing.assert_array_equal(new[0], old[0])
        np.testing.assert_allclose(new[1], old[1] + 0.5, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at least one that is as long"):
        kvcomm.corrected(text, [])


def test_runs_grow_in_buckets():
    cache = kvjax.empty_cache(batch=1, layers=1, kv_heads=1, head_dim=2, slots=8)
    room = kvjax.Room(4, "full", total=4)
    run = kvjax.Run(jnp.zeros((1, 3)), cache, (), jnp.array([4]), room)
    grown = vattention.grown(run, 5, bucket=4)
    assert grown.room.total == 12 and grown.cache.layers[0].segments[0].pos.shape == (1, 1, 16)
    with pytest.raises(ValueError, match="frees slots"):
        vattention.grown(run._replace(room=kvjax.Room(4, "h2o", total=None, call=1)), 1)


def test_branches_are_kept_for_worth_diversity_and_a_shared_trunk():
    assert ets.rebase_counts([1.0, 1.0, -9.0], 4).tolist() == [2, 2, 0]
    # Two leaves of one trunk, one of another that is worth as much: the cache of a second trunk has to pay.
    paths, worth = [(0, 1), (0, 1), (2, 3)], [1.0, 1.0, 1.0]
    kept = lambda **how: ets.kept_leaves(paths, worth, [0, 1, 1], **how).tolist()
    assert kept(budget_weight=0.0) == [True, True, True]
    assert kept(budget_weight=1.2, diversity_weight=1.0) == [True, True, False]
    assert sum(kept(budget_weight=99.0, diversity_weight=0.0)) == 1
    near = np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    assert len(set(ets.clusters(near))) == 2 and ets.clusters(near)[0] == ets.clusters(near)[1]
    with pytest.raises(ValueError, match="of the same leaves"):
        ets.kept_leaves(paths, worth, [0])
