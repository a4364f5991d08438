"""What calibrations compute, against linear algebra and searches done by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import methods
from kvjax.calibration import greedy_ranks, weighted_components

H = 8


@pytest.mark.parametrize("rank", [2, 5, H])
def test_weighted_components_lose_what_the_best_factorisation_of_the_logits_loses(rank):
    rng = np.random.default_rng(0)
    k, q = (rng.normal(size=(n, H)) @ rng.normal(size=(H, H)) for n in (60, 90))
    axes, inverse = map(np.asarray, weighted_components(jnp.float32(k.T @ k), jnp.float32(q.T @ q)))
    np.testing.assert_allclose(axes.T @ inverse, np.eye(H), atol=1e-4)
    lost = np.linalg.norm((k - k @ axes[:, :rank] @ inverse[:, :rank].T) @ q.T)
    best = np.sqrt((np.linalg.svd(k @ q.T)[1][rank:H] ** 2).sum())  # Eckart and Young
    # float32, in parts of all the logits.
    np.testing.assert_allclose(lost, best, rtol=1e-3, atol=1e-5 * np.linalg.norm(k @ q.T))
    if rank < H:
        plain = np.linalg.svd(k)[2][:rank]
        assert best < 0.95 * np.linalg.norm((k - k @ plain.T @ plain) @ q.T)


def test_the_search_takes_from_the_cheapest_until_the_mean_rank_is_reached():
    # Entry i loses weight[i] / rank with every cut, so that cost rises as an entry shrinks.
    weight = np.array([[1.0, 2.0], [4.0, 100.0]])
    seen = []

    def errors(ranks):
        seen.append(ranks.copy())
        return weight / ranks

    three_quarters, half = greedy_ranks(errors, (2, 2), 8, (0.75, 0.5), step=2, share=0.5)
    # 32 columns in all. Two entries a round: the first two; then, at 6, 6, 8, 8, the first two again: 24 are left.
    assert three_quarters.tolist() == [[4, 4], [8, 8]]
    # At 4, 4, 8, 8: the first, and the second before the third, which costs as much. Then the floor holds these, and
    # both others give up columns, however much they cost.
    assert half.tolist() == [[2, 2], [6, 6]]
    assert [ranks.ravel().tolist() for ranks in seen] == [
        [8, 8, 8, 8],
        [6, 6, 8, 8],
        [4, 4, 8, 8],
        [2, 2, 8, 8],
    ]
    with pytest.raises(ValueError, match="rates must leave 2 of 8 columns to every entry, got 0.1"):
        greedy_ranks(errors, (2, 2), 8, (0.1,), step=2)


def test_ranks_that_were_not_searched_are_refused():
    data = {"key_axes": jnp.zeros((2, 2, 8, 8)), "value_axes": jnp.zeros((2, 2, 8, 8))}
    with pytest.raises(ValueError, match="key_rank must be given where the calibration has no search"):
        methods.matryoshka_pca(data)
    ranks = jnp.full((1, 2, 2), 4.0)
    data |= {"rates": jnp.float32([0.5]), "key_ranks": ranks, "value_ranks": ranks}
    with pytest.raises(ValueError, match=r"rate must be one that the calibration searched, \[0.5\], got 0.3"):
        methods.matryoshka_pca(data, rate=0.3)
    with pytest.raises(ValueError, match="value_rank must be from 1 to the 8 channels of a head, got 9"):
        methods.matryoshka_pca(data, value_rank=9)
