"""What XLA makes of a generation: a donated cache is updated where it lies."""

import jax
import jax.numpy as jnp

import kvjax
from tests.kvjax import tiny_model


def test_the_loop_of_generation_updates_a_donated_cache_in_place():
    slots, step = 4096, tiny_model.bind
    transform = kvjax.methods.full()

    def write(params, run):
        return kvjax.generate(
            step(params),
            transform,
            run,
            max_new_tokens=8,
            sampler=kvjax.Greedy(),
            key=jax.random.key(0),
            prompt_slots=24,
        )

    def read(params, tokens, cache):
        return kvjax.prefill(step(params), transform, tokens, jnp.array([24]), cache, room=slots)

    params = tiny_model.params()
    run = jax.eval_shape(read, params, tiny_model.prompt(1, 24), tiny_model.empty(1))
    memory = jax.jit(write, donate_argnums=1).lower(params, run).compile().memory_analysis()
    layer = kvjax.nbytes(run.cache.layers[0])
    assert memory.alias_size_in_bytes >= kvjax.nbytes(run.cache)
    # A copy of one layer's keys alone would be nearly half of the layer.
    assert memory.temp_size_in_bytes < layer / 4
