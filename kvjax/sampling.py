"""How the next token is drawn: frozen records with one method."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Sampler(Protocol):
    """Draws tokens from logits."""

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Draws i32[B] tokens, -1 where a row has NaN.

        Args:
          logits: f32[B, V].
          keys: a PRNG key for each of the B rows, so that a row's draw depends on nothing beside it; or one for all,
            of which `row_keys` makes them.
        """


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the most likely token; of equal ones the lowest id."""

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """See `Sampler`."""
        return _unless_nan(logits, jnp.argmax(logits, axis=-1))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws from `softmax(logits / temperature)`, cut to the `top_k` most likely and the `top_p` nucleus.

    Of tokens with equal logits at a cut, those with the lowest ids stay, so that `top_k=3` keeps three.

    Attributes:
      temperature: above 0.
      top_k: tokens that stay; None: all.
      top_p: the smallest set of tokens with at least this probability stays; None or 1: all.
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

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """See `Sampler`."""
        logits = logits.astype(jnp.float32)
        # The most likely token is at 0 whatever the temperature. Subnormal temperatures count as 0: 0 / 0 is NaN.
        warm = jnp.maximum(jnp.float32(self.temperature), jnp.finfo(jnp.float32).tiny)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        scaled = jnp.where(logits == highest, 0.0, logits - highest) / warm  # infinity is the highest, too
        ids, nucleus = None, self.top_p is not None and self.top_p < 1
        if self.top_k is not None or nucleus:
            V = logits.shape[-1]
            scaled, ids = jax.lax.top_k(scaled, V if self.top_k is None else min(self.top_k, V))
        if nucleus:
            probability = jax.nn.softmax(scaled, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            inside = (before < self.top_p).at[..., 0].set(True)
            scaled = jnp.where(inside, scaled, -jnp.inf)
        drawn = jax.vmap(jax.random.categorical)(row_keys(keys, scaled.shape[0]), scaled)
        if ids is not None:
            drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
        return _unless_nan(logits, drawn)


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Returns a PRNG key for each of so many rows: as given, or one made of the key and the number of the row."""
    alone = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1  # typed keys are scalars, raw ones words
    return key if key.ndim > alone else jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def _unless_nan(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, tokens).astype(jnp.int32)
