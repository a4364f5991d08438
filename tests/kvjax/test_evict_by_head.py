"""Budgets that heads share, while tokens come: after every action each head holds what Ada-KV's rule gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Cache, LayerCache, Queries, Rope, Segment, adaptive, every, evict_by_head, scores
from kvjax.observation import LayerObservation, Observation
from tests.kvjax import conformance, table_decoder
from tests.kvjax.conformance import positions
from tests.quick_jit import quick_jit

B, K, H, PROMPT, NEW, ACTIONS = 2, 3, 4, 20, 4, 3
TOTAL = PROMPT + NEW * ACTIONS
BUDGET, RECENT, FLOOR = 6, 2, 0.2


def _adaptive(worth: np.ndarray, held: list[list[int]]) -> list[list[int]]:
    """Ada-KV, algorithm 1: what each head keeps of the tokens it holds, the newest aside."""
    newest = max(max(head) for head in held)
    older = [[t for t in head if t <= newest - RECENT] for head in held]
    free = BUDGET - RECENT
    ranked = sorted(((-worth[h, t], h) for h, head in enumerate(older) for t in head))
    counts = np.bincount([h for _, h in ranked[: K * free]], minlength=K)
    counts = np.rint((1 - FLOOR) * counts + FLOOR * free).astype(int)
    kept = [sorted(sorted(head, key=lambda t: -worth[h, t])[: counts[h]]) for h, head in enumerate(older)]
    return [[*head, *(t for t in held[h] if t > newest - RECENT)] for h, head in enumerate(kept)]


def _observation(new: int, phase: str) -> Observation:
    nothing = Queries(jnp.zeros((B, 0, K, H)), jnp.zeros((B, 0), jnp.int32), Rope.from_base(100.0, H))
    layer = LayerObservation(nothing, jnp.zeros((B, 0, K)), layer=jnp.int32(0))
    lengths = jnp.full((B,), PROMPT)
    return Observation((layer,), new=jnp.full((B,), new), prompt=lengths, prompt_slots=PROMPT, phase=phase)


def test_heads_share_the_budget_anew_at_every_action():
    rng = np.random.default_rng(0)
    k = rng.normal(size=(B, K, TOTAL, H)) * rng.uniform(0.5, 2, size=(B, K, 1, 1))  # heads of unlike norms
    worth = -np.linalg.norm(k, axis=-1)
    segment = lambda keys, pos: Segment.of(keys, keys, jnp.broadcast_to(pos, keys.shape[:3]))
    k = jnp.float32(k)
    transform = every(
        NEW, evict_by_head(scores.negative_key_norm(), BUDGET, heads=adaptive(FLOOR), recent=RECENT, page=4)
    )
    cache = Cache(
        (LayerCache((segment(k[:, :, :PROMPT], jnp.arange(PROMPT)),)),), length=jnp.full((B,), PROMPT)
    )
    cache, state = quick_jit(transform.init)(cache, _observation(PROMPT, "prefill"))
    cache = cache.reserve(NEW)
    step = quick_jit(lambda cache, state: transform.step(cache, state, _observation(NEW, "decode")))
    size = kvjax.nbytes(cache)
    held = [_adaptive(worth[row], [list(range(PROMPT))] * K) for row in range(B)]
    assert len({len(head) for row in held for head in row}) > 1  # heads do differ
    for first in range(PROMPT, TOTAL + 1, NEW):
        for row in range(B):
            assert conformance.positions(cache, row)[0] == held[row]
            assert abs(sum(map(len, held[row])) - K * BUDGET) <= K / 2
        if first == TOTAL:
            break
        new = jnp.arange(first, first + NEW)
        tail = segment(k[:, :, first : first + NEW], new)
        assert cache.layers[0].segments[-1].pos.shape == tail.pos.shape
        cache, state = step(cache.map_layers(lambda layer: layer.with_tail(tail)), state)
        assert kvjax.nbytes(cache) == size
        held = [_adaptive(worth[row], [[*head, *new.tolist()] for head in held[row]]) for row in range(B)]


def test_keys_follow_their_tokens_through_the_pages():
    k = jax.random.normal(jax.random.key(0), (1, K, PROMPT, H))
    tokens = jnp.broadcast_to(jnp.arange(PROMPT), (1, K, PROMPT))
    cache = Cache((LayerCache((Segment.of(k, 2 * k, tokens),)),), length=jnp.array([PROMPT]))
    seen = _observation(PROMPT, "prefill")
    seen = seen.replace(prompt=seen.prompt[:1], new=seen.new[:1])
    cache, _ = evict_by_head(scores.negative_key_norm(), BUDGET, heads=adaptive(), page=4).init(cache, seen)
    pages = cache.layers[0].segments[0]
    for page, slot in zip(*np.nonzero(np.asarray(pages.pages.pos[0]) >= 0)):
        head, token = int(pages.owner[0, page]), int(pages.pages.pos[0, page, slot])
        np.testing.assert_array_equal(pages.pages.k[0, page, slot], k[0, head, token])
        np.testing.assert_array_equal(pages.pages.v[0, page, slot], 2 * k[0, head, token])


def test_statistics_of_the_past_are_refused_after_the_prompt():
    transform = evict_by_head(scores.accumulated_attention(), BUDGET, heads=adaptive())
    with pytest.raises(ValueError, match="its scorer wants attention: wrap it in at_prefill_end"):
        transform.update(None, None, None)


def test_equal_shares_keep_what_evict_keeps_also_by_the_end_of_the_prompt():
    """A scorer that must know how long the prompt is is told so, whatever selects."""
    step, lengths = table_decoder.decoder(table_decoder.tables()), jnp.array([24, 13])
    tokens, scorer = jnp.int32(table_decoder.distinct_tokens(2, 24)), kvjax.scores.end_attention(0.3)
    heads = kvjax.adaptive(floor=1.0)
    kept = []
    for transform in (
        kvjax.evict(scorer, 8),
        kvjax.evict_by_head(scorer, 8, heads=heads, page=4),
        kvjax.evict_across_layers(scorer, 8, heads=heads, page=4),
    ):
        run = kvjax.prefill(
            step, kvjax.at_prefill_end(transform), tokens, lengths, table_decoder.empty(2), room=1
        )
        kept.append([positions(run.cache, row) for row in range(2)])
    assert kept[0] == kept[1] == kept[2]
