"""`combine`: hand-computed cases, and the laws that let it serve segments, split-K, prefixes and shards."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.partial import Partial, combine
from tests.pallas_kernels.attention_numpy import attention

# float32 sums of at most a few dozen terms of order one, in another order than the reference's.
TOLERANCE = dict(rtol=2e-6, atol=2e-6)


def _partial(out, lse):
    """A partial of one query and one head from a list (H numbers) and a float."""
    return Partial(
        jnp.asarray(out, jnp.float32).reshape(1, 1, 1, -1), jnp.asarray(lse, jnp.float32).reshape(1, 1, 1)
    )


NOTHING = _partial([0.0, 0.0], -np.inf)


def test_two_parts_by_hand():
    # exp(lse) = 1 and 3: weights 1/4 and 3/4; lse = log 4.
    merged = combine([_partial([4.0, 0.0], 0.0), _partial([0.0, 8.0], np.log(3.0))])
    np.testing.assert_allclose(merged.out.ravel(), [1.0, 6.0], rtol=1e-6)
    np.testing.assert_allclose(merged.lse.ravel(), [np.log(4.0)], rtol=1e-6)


def test_three_equal_parts_average_by_hand():
    merged = combine([_partial([x, -x], 5.0) for x in (0.0, 3.0, 9.0)])
    np.testing.assert_allclose(merged.out.ravel(), [4.0, -4.0], rtol=1e-6)
    np.testing.assert_allclose(merged.lse.ravel(), [5.0 + np.log(3.0)], rtol=1e-6)


def test_one_part_is_returned_as_it_is():
    part = _partial([1.0, 2.0], 0.5)
    assert combine([part]) is part


@pytest.mark.parametrize("lse", [-200.0, 0.0, 200.0, 1e30, -1e30])
def test_empty_parts_are_neutral(lse):
    part = _partial([3.0, -7.0], lse)
    for parts in ([part, NOTHING], [NOTHING, part], [NOTHING, part, NOTHING]):
        merged = combine(parts)
        np.testing.assert_array_equal(merged.out, part.out)
        np.testing.assert_array_equal(merged.lse, part.lse)


def test_only_empty_parts_make_an_empty_part():
    merged = combine([NOTHING, NOTHING])
    np.testing.assert_array_equal(merged.out.ravel(), [0.0, 0.0])
    assert merged.lse.item() == -np.inf


def test_a_dominant_part_wins_without_overflow():
    merged = combine([_partial([1.0, 1.0], 1e4), _partial([5.0, 5.0], -1e4)])
    np.testing.assert_array_equal(merged.out.ravel(), [1.0, 1.0])
    assert merged.lse.item() == 1e4


def test_no_parts_are_refused():
    with pytest.raises(ValueError, match="partials must hold at least one"):
        combine([])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_in_any_order_and_association_is_dense_attention(data):
    B, T, N, K, H = 1, 3, 4, 2, 8
    S = data.draw(st.integers(1, 24), label="slots")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    magnitude = data.draw(st.sampled_from([1.0, 30.0]), label="magnitude")
    q = rng.normal(size=(B, T, N, H)) * magnitude
    k, v = rng.normal(size=(2, B, K, S, H))
    q_pos = np.array([[2, S // 2, S]])
    k_pos = np.where(rng.random((B, K, S)) < 0.2, -1, rng.permuted(np.tile(np.arange(S), (B, K, 1)), axis=2))
    owner = np.array(data.draw(st.lists(st.integers(0, 4), min_size=S, max_size=S), label="owner"))

    parts = []
    for segment in data.draw(st.permutations(range(5)), label="order"):
        mine = owner == segment
        part = attention(q, k[:, :, mine], v[:, :, mine], q_pos, k_pos[:, :, mine])
        parts.append(Partial(jnp.float32(part.out), jnp.float32(part.lse)))
    while len(parts) > 1:  # any association: merge any group of neighbours, again and again
        first = data.draw(st.integers(0, len(parts) - 2), label="first")
        size = data.draw(st.integers(2, len(parts) - first), label="size")
        parts[first : first + size] = [combine(parts[first : first + size])]

    whole = attention(q, k, v, q_pos, k_pos)
    np.testing.assert_allclose(parts[0].out, whole.out, rtol=1e-5, atol=1e-5)  # weights rounded up to 4 times
    np.testing.assert_allclose(parts[0].lse, whole.lse, rtol=1e-6, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    lse=st.lists(st.floats(-80, 80, width=32) | st.just(-np.inf), min_size=3, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_combine_is_commutative_and_associative(lse, seed):
    out = np.random.default_rng(seed).normal(size=(3, 4))
    a, b, c = (_partial(o if x > -np.inf else 0 * o, x) for o, x in zip(out, lse))
    # On either side a log-sum-exp is stored in between, rounded by half a last place: so much the weights differ.
    last_place = np.finfo(np.float32).eps * max([abs(x) for x in lse if x > -np.inf], default=0.0)
    of_outputs = dict(rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"] + last_place * np.abs(out).max())
    for left, right in [
        (combine([a, b]), combine([b, a])),
        (combine([combine([a, b]), c]), combine([a, combine([b, c])])),
        (combine([a, b, c]), combine([c, combine([a, b])])),
    ]:
        np.testing.assert_allclose(left.out, right.out, **of_outputs)
        np.testing.assert_allclose(left.lse, right.lse, **TOLERANCE)
