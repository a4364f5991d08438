"""The optax chain: what a step size is when, and what gradients are cut to."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.optimizers import optimizer


def step_sizes(chain, steps, gradient=1.0):
    """What a parameter moves by with the same gradient at every step, which is Adam's learning rate."""
    x = jnp.zeros(())
    state, sizes = chain.init(x), []
    for _ in range(steps):
        update, state = chain.update(jnp.float32(gradient), state, x)
        x = optax.apply_updates(x, update)
        sizes.append(-float(update))
    return sizes


# Adam's epsilon of 1e-8 beside gradients of one, in float32.
CLOSE = dict(rtol=1e-4, atol=1e-9)


def test_it_warms_up_stays_and_falls():
    chain = optimizer(10, learning_rate=0.1, warmup=0.2, schedule="linear", final=0.0, cooldown=0.5)
    np.testing.assert_allclose(
        step_sizes(chain, 10), [0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025], **CLOSE
    )


def test_a_cosine_ends_at_its_final_fraction():
    sizes = step_sizes(optimizer(101, learning_rate=1.0, warmup=0.0, final=0.1), 101)
    np.testing.assert_allclose(sizes[51], 0.55, rtol=0.02)  # halfway
    np.testing.assert_allclose(sizes[100], 0.1, rtol=0.01)


def test_accumulated_gradients_are_averaged_for_one_update():
    chain = optimizer(4, learning_rate=1.0, warmup=0.0, schedule="constant", clip_norm=None, accumulate=2)
    x = jnp.zeros(())
    state, updates = chain.init(x), []
    for gradient in (3.0, -1.0, 2.0, 2.0):
        update, state = chain.update(jnp.float32(gradient), state, x)
        updates.append(float(update))
    np.testing.assert_allclose(updates[0::2], 0.0)
    np.testing.assert_allclose(updates[1], -1.0, **CLOSE)


def test_gradients_are_cut_by_value_and_by_norm():
    def first_moment(**how):
        chain = optimizer(4, clip_norm=how.get("clip_norm"), clip_value=how.get("clip_value"))
        x = jnp.zeros(2)
        _, state = chain.update(jnp.float32([3.0, 4.0]), chain.init(x), x)
        return np.asarray(optax.tree.get(state, "mu")) / 0.1  # what came through, of which a tenth is taken

    np.testing.assert_allclose(first_moment(), [3.0, 4.0], rtol=1e-5)
    np.testing.assert_allclose(first_moment(clip_norm=1.0), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(first_moment(clip_value=3.5), [3.0, 3.5], rtol=1e-5)


@pytest.mark.parametrize(
    "how, says",
    [
        (dict(schedule="square"), "schedule must be"),
        (dict(accumulate=0), "accumulate must be at least 1"),
        (dict(warmup=1.0), "warmup must be in"),
        (dict(cooldown=0.0), "cooldown in"),
    ],
)
def test_bad_settings_are_refused(how, says):
    with pytest.raises(ValueError, match=says):
        optimizer(10, **how)
