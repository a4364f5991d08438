"""Which slots a query sees, on a table written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.visibility import visible

SLOTS = [0, 3, -1, 5, 4]


@pytest.mark.parametrize(
    "query, window, expected",
    [
        (5, None, [1, 1, 0, 1, 1]),
        (4, None, [1, 1, 0, 0, 1]),
        (0, None, [1, 0, 0, 0, 0]),
        (-1, None, [0, 0, 0, 0, 0]),
        (5, 1, [0, 0, 0, 1, 0]),
        (5, 2, [0, 0, 0, 1, 1]),
        (5, 5, [0, 1, 0, 1, 1]),
        (5, 6, [1, 1, 0, 1, 1]),
        (-1, 3, [0, 0, 0, 0, 0]),
    ],
)
def test_a_query_sees_occupied_slots_of_its_past_inside_its_window(query, window, expected):
    mask = visible(jnp.array([query]), jnp.array(SLOTS), window)
    np.testing.assert_array_equal(mask, np.array([expected], bool))
