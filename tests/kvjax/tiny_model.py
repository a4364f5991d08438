"""A decoder with random weights, small enough to compile in a second, and prompts for it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models import decoder
from models.config import DecoderConfig
from models.decoder import prompt_cache
from models.params import DecoderParams
from models.weights import random_params

CONFIG = DecoderConfig(
    name="tiny",
    vocab_size=800,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_width=48,
    max_positions=16384,
)


@functools.cache
def params(config: DecoderConfig = CONFIG) -> DecoderParams:
    """The same random float32 weights at every call."""
    with jax.ensure_compile_time_eval():  # kept beyond the program that asks first
        return random_params(config, jax.random.key(0), jnp.float32)


def bind(weights: DecoderParams, config: DecoderConfig = CONFIG):
    """The decoder over weights that may be traced."""
    return decoder.bind(weights, config)


def empty(batch: int, config: DecoderConfig = CONFIG):
    """A cache without slots."""
    return prompt_cache(config, batch)


def prompt(batch: int, tokens: int, seed: int = 0) -> jax.Array:
    """i32[B, T] random tokens, also where a prompt's padding will be.

    No token comes twice in a row, nor under another seed below 8: equal tokens have equal keys in the first
    layer, and scores of equal keys are ties.
    """
    rng = np.random.default_rng(seed)
    rows = [100 * seed + rng.permutation(100)[:tokens] for _ in range(batch)]
    return jnp.int32(np.stack(rows))
