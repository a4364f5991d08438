"""What a training recipe is, and how it sees the frozen decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kvjax
from experiments.training_text import Batch
from models import DecoderConfig, Model
from models.decoder import prompt_cache, step

Trained = Any
"""A pytree of float arrays: the only thing that gradients reach."""

Metrics = Mapping[str, jax.Array]


class Frozen(NamedTuple):
    """What a loss reads and training leaves as it is."""

    params: dict  # of the decoder
    constants: Any  # of the recipe, such as where it starts from


class Recipe(NamedTuple):
    """How one method's small parts are trained.

    Attributes:
      method: config of the method that uses the result; what the artifact is called.
      start: `(model) -> (trained, constants)`.
      loss: `(config, trained, frozen, batch, key) -> (f32[] loss, metrics)`; pure, and the same program for every
        batch of a shape.
      finish: `(model, trained, constants) -> calibration`, what the method reads.
      constrain: `(trained) -> trained` after every update.
    """

    method: str
    start: Callable[[Model], tuple[Trained, Any]]
    loss: Callable[[DecoderConfig, Trained, Frozen, Batch, jax.Array], tuple[jax.Array, Metrics]]
    finish: Callable[[Model, Trained, Any], Mapping[str, jax.Array]]
    constrain: Callable[[Trained], Trained] = lambda trained: trained


class Read(NamedTuple):
    """What the frozen decoder makes of a batch."""

    context: kvjax.StepOutput  # after the contexts, from an empty cache
    follow: kvjax.StepOutput  # after what follows, from the exact cache of the contexts


def context_positions(batch: Batch) -> jax.Array:
    """i32[B, P], -1 at padding."""
    index = jnp.arange(batch.context.shape[1])[None]
    return jnp.where(index < batch.lengths[:, None], index, -1)


def follow_positions(batch: Batch) -> jax.Array:
    """i32[B, T]. What fills up a row counts as text: it comes last, so nothing that counts can see it."""
    return batch.lengths[:, None] + jnp.arange(batch.follow.shape[1])[None]


def read_context(
    config: DecoderConfig,
    params: dict,
    batch: Batch,
    *,
    needs: kvjax.Needs = kvjax.Needs(),
    before: Callable[[kvjax.Cache], kvjax.Cache] = lambda cache: cache,
    remat: bool = False,
) -> kvjax.StepOutput:
    """The contexts, read exactly, from an empty cache or what `before` makes of it."""
    cache = before(prompt_cache(config, batch.context.shape[0], params.embed.dtype))
    positions = context_positions(batch)
    return step(params, config, batch.context, positions, cache, needs=needs, last_only=True, remat=remat)


def read_follow(
    config: DecoderConfig,
    params: dict,
    batch: Batch,
    cache: kvjax.Cache,
    *,
    needs: kvjax.Needs = kvjax.Needs(),
    remat: bool = False,
) -> kvjax.StepOutput:
    """What follows the contexts, from any cache of them; its logits are f32[B, T, V]."""
    cache, positions = cache.reserve(batch.follow.shape[1]), follow_positions(batch)
    return step(params, config, batch.follow, positions, cache, needs=needs, last_only=False, remat=remat)


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    """Of each next token of `follow`, weighed, averaged over rows; logits f32[B, T, V] after each token."""
    log_p = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_p, batch.follow[:, 1:, None], axis=-1)[..., 0]
    return -jnp.mean(jnp.sum(batch.weight[:, 1:] * picked, axis=1))


def divergence(teacher: jax.Array, student: jax.Array, batch: Batch) -> jax.Array:
    """`KL(teacher || student)` of each next token of `follow`, weighed, averaged over rows; logits as above."""
    log_p, log_q = (jax.nn.log_softmax(x[:, :-1]) for x in (teacher, student))
    each = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.mean(jnp.sum(batch.weight[:, 1:] * each, axis=1))
