"""What XLA makes of a generation: a donated cache is updated where it lies."""

import jax
import jax.numpy as jnp
import pytest

import kvjax
from tests.kvjax import tiny_model


SLOTS = 4096
# One head of each kind in both layers: the slot of a single head is what XLA would rather read twice.
HEADS = {"induction": jnp.array([[0.1, 0.9], [0.2, 0.3]]), "echo": jnp.array([[0.5, 0.6], [0.7, 0.1]])}
TRANSFORMS = {
    "full": kvjax.methods.full,
    "razorattention": lambda: kvjax.methods.razorattention(HEADS, 0.25, 0.25, recent=SLOTS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_loop_of_generation_updates_a_donated_cache_in_place(name):
    step, transform = tiny_model.bind, TRANSFORMS[name]()

    def write(params, run):
        return kvjax.generate(
            step(params),
            transform,
            run,
            max_new_tokens=8,
            sampler=kvjax.Greedy(),
            key=jax.random.key(0),
        )

    def read(params, tokens, cache):
        return kvjax.prefill(step(params), transform, tokens, jnp.array([24]), cache, room=SLOTS)

    params = tiny_model.params()
    run = jax.eval_shape(read, params, tiny_model.prompt(1, 24), tiny_model.empty(1))
    memory = jax.jit(write, donate_argnums=1).lower(params, run).compile().memory_analysis()
    layer = kvjax.nbytes(run.cache.layers[0])
    assert memory.alias_size_in_bytes >= kvjax.nbytes(run.cache)
    # A copy of one layer's keys alone would be nearly half of the layer.
    assert memory.temp_size_in_bytes < layer / 4
