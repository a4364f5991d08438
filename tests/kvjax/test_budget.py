"""Budgets: counts, fractions and their rounding."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax.budget import Fraction, Tokens, budget_rows, budget_slots, check_budget


@pytest.mark.parametrize(
    "budget, prompt, slots",
    [
        *((7, 100, 7), (200, 100, 200), (0.5, 100, 50), (0.5, 7, 3), (0.3, 10, 3), (0.1, 5, 1), (1.0, 5, 5), (1, 5, 1)),
        *((Tokens(1), 5, 1), (Tokens(7), 100, 7), (Fraction(1), 5, 5), (Fraction(0.3), 10, 3)),
    ],
)
def test_slots_by_hand(budget, prompt, slots):
    assert budget_slots(budget, prompt) == slots
    assert budget_rows(budget, jnp.array([prompt]), prompt).tolist() == [slots]


@given(st.integers(1, 1000), st.integers(1, 100_000))
def test_a_fraction_in_thousandths_is_rounded_down_exactly(thousandths, prompt):
    # 0.3 * 10 is 2.9999 in binary; decimal arithmetic is what people mean.
    exact = max(1, thousandths * prompt // 1000)
    assert budget_slots(thousandths / 1000, prompt) in (exact, exact + (thousandths * prompt % 1000 == 999))


@settings(deadline=None)
@given(st.integers(1, 100), st.lists(st.integers(1, 8192), min_size=4, max_size=4))
def test_rows_agree_with_slots(percent, prompts):
    rows = budget_rows(percent / 100, jnp.array(prompts), max(prompts))
    assert rows.dtype == jnp.int32
    np.testing.assert_array_equal(rows, [budget_slots(percent / 100, p) for p in prompts])


@pytest.mark.parametrize("budget, prompt", [(0.667, 24994), (0.333, 50006), (0.67, 195697), (0.53, 68300)])
def test_rows_never_exceed_the_slots_where_float32_cannot_count(budget, prompt):
    # The first three products round up in float32: a row would keep a token more than there are slots for.
    rows = budget_rows(budget, jnp.array([prompt, prompt - 9]), prompt)
    slots = budget_slots(budget, prompt)
    assert slots - 1 <= rows[0] <= slots and rows[1] <= slots


@pytest.mark.parametrize("budget", [Tokens(1), 5, 0.001, 1.0, Fraction(1)])
def test_sensible_budgets_pass(budget):
    check_budget(budget)


@pytest.mark.parametrize(
    "budget, at_least, message",
    [
        (0, 1, r"budget must be at least 1 tokens \(one token\), got 0"),
        (-3, 1, "budget must be at least 1 tokens .*, got -3"),
        (4, 5, "budget must be at least 5 tokens .*, got 4"),
        (0.0, 1, r"budget as a fraction of the prompt must be in \(0, 1\], got 0.0"),
        (-0.5, 1, r"budget as a fraction .* got -0.5"),
        (1.5, 1, r"budget as a fraction .* got 1.5"),
        (float("nan"), 1, r"budget as a fraction .* got nan"),
        (True, 1, "budget must be an int .* or a float .*, got True"),
        ("half", 1, "budget must be an int .* got 'half'"),
        (None, 1, "budget must be an int .* got None"),
        (1, 1, r"budget must be 1.0 for the whole prompt or kvjax.Tokens\(1\) for one token, got 1"),
        (1, 5, r"budget must be 1.0 for the whole prompt or kvjax.Tokens\(1\) for one token, got 1"),
        (Tokens(1), 5, "budget must be at least 5 tokens .*, got 1"),
    ],
)
def test_other_budgets_are_refused_by_name(budget, at_least, message):
    with pytest.raises(ValueError, match=message):
        check_budget(budget, at_least=at_least)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Tokens(-1), "Tokens must be a whole number of at least 0, got -1"),
        (lambda: Tokens(1.0), "Tokens must be a whole number of at least 0, got 1.0"),
        (lambda: Tokens(True), "Tokens must be a whole number of at least 0, got True"),
        (lambda: Fraction(0), r"Fraction must be in \(0, 1\], got 0"),
        (lambda: Fraction(2), r"Fraction must be in \(0, 1\], got 2"),
        (lambda: Fraction(float("nan")), r"Fraction must be in \(0, 1\], got nan"),
    ],
)
def test_what_is_no_count_or_part_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_they_are_numbers_that_say_what_they_are():
    assert repr([Tokens(1), Fraction(1)]) == "[Tokens(1), Fraction(1.0)]"
    assert f"{Tokens(1)} or {Fraction(1)}" == "1 or 1.0"
    assert isinstance(Tokens(3), int) and isinstance(Fraction(0.5), float) and jnp.arange(4)[Tokens(3)] == 3


@pytest.mark.parametrize("kind", [int, Tokens])
def test_recent_is_a_count_or_a_part_of_the_budget(kind):
    scorer = kvjax.scores.negative_key_norm()
    one, all_of_it = (kvjax.evict(scorer, 4, recent=recent).schedule.at_least for recent in (kind(1), 1.0))
    assert (one, all_of_it) == (1, 1)
    with pytest.raises(ValueError, match="kvjax.Tokens"):
        kvjax.evict(scorer, 1)
    assert kvjax.evict(scorer, Tokens(1)).schedule.described == "evict with a budget of 1"
