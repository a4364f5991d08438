"""How the next token is drawn: frozen records with one method."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Sampler(Protocol):
    """Draws tokens from logits."""

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """f32[B, V] logits -> i32[B] tokens."""


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token."""

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """See `Sampler`."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws from `softmax(logits / temperature)`, cut to the `top_k` most likely and the `top_p` nucleus.

    Attributes:
      temperature: above 0.
      top_k: tokens that stay; None: all.
      top_p: the smallest set of tokens with at least this probability stays; None: all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; Greedy() draws the mode.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """See `Sampler`."""
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k is not None:
            lowest = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][..., -1:]
            logits = jnp.where(logits < lowest, -jnp.inf, logits)
        if self.top_p is not None:
            ordered = jnp.sort(logits, axis=-1)[..., ::-1]
            probability = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            lowest = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < lowest, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
