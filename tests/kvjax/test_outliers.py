"""Outliers where there are no tokens."""

import jax.numpy as jnp
import pytest

from kvjax.codecs.outliers import Outliers, add_outliers


@pytest.mark.parametrize("axis, shape", [("channel", (2, 3, 0, 8)), ("token", (2, 3, 4, 0))])
def test_a_body_without_a_whole_block_stays_as_it_is(axis, shape):
    x = jnp.zeros((2, 3, 0, 8))
    none = Outliers(jnp.zeros(shape, jnp.uint8), jnp.zeros(shape))
    assert add_outliers(x, none, axis=axis, block=64).shape == x.shape
