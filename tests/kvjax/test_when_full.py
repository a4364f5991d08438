"""`when_full` acts when a layer holds more than its own budget allows, and no token that comes is lost."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import scores, when_full
from tests.kvjax import table_decoder
from tests.kvjax.conformance import positions
from tests.quick_jit import quick_jit

STEP = table_decoder.decoder(table_decoder.tables())
T, LENGTHS, STEPS, SLACK, BUDGET = 24, (24, 9), 11, 3, 12


def _held(transform, row: int) -> list[list[list[list[int]]]]:
    """Positions of each layer and head, after the prompt and after each token."""
    tokens = jnp.int32(table_decoder.distinct_tokens(2, T + STEPS))
    prefill = quick_jit(
        lambda cache: kvjax.prefill(STEP, transform, tokens[:, :T], jnp.array(LENGTHS), cache, room=STEPS)
    )
    extend = quick_jit(lambda run, new: kvjax.extend(STEP, transform, run, new, jnp.ones(2, jnp.int32))[0])
    runs = [prefill(table_decoder.empty(2))]
    for t in range(STEPS):
        runs.append(extend(runs[-1], tokens[:, T + t : T + t + 1]))
    return [positions(run.cache, row) for run in runs]


@pytest.mark.parametrize("row, budgets", [(0, (18, 6)), (1, (12, 12))])
def test_layers_of_different_budgets_are_compared_with_their_own(row, budgets):
    transform = when_full(SLACK, kvjax.evict(scores.negative_key_norm(), BUDGET, layers=kvjax.pyramid(2)))
    want = [min(LENGTHS[row], n) for n in budgets]  # a prompt of less than 24 tokens is split evenly
    for held in _held(transform, row):
        assert [[len(head) for head in layer] for layer in held] == [[n] * 2 for n in want]
        want = [n + 1 for n in want]
        if any(n >= rows + SLACK for n, rows in zip(want, budgets)):
            want = [min(n, rows) for n, rows in zip(want, budgets)]


def test_heads_that_share_a_budget_take_up_every_token():
    heads = kvjax.adaptive()
    transform = when_full(SLACK, kvjax.evict_by_head(scores.negative_key_norm(), BUDGET, heads=heads, recent=4, page=4))
    for t, held in enumerate(_held(transform, 0)):
        for layer in held:
            assert all(head[-4:] == list(range(T + t - 4, T + t)) for head in layer)
            assert 2 * BUDGET - 1 <= np.sum([len(head) for head in layer]) <= 2 * (BUDGET + SLACK)
