"""A prompt that is read once, with the full cache, and compressed by several methods."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import kvjax
from experiments.methods import Method
from kvjax.observation import Observation, last_queries
from models import Model
from models.decoder import bind, prompt_cache


def shared_needs(methods: Sequence[Method]) -> kvjax.Needs:
    """What the decoder must collect for all methods that compress a prompt which was read once for all."""
    needs = kvjax.Needs()
    for method in methods:
        if not method.reads_alone:
            needs = needs.union(method.transform.schedule.needs._replace(reread=None))  # each does so by itself
    return needs


def padded(ids: Sequence[int], slots: int | None) -> jax.Array:
    """i32[1, slots]: a prompt padded at its end; None: as it is."""
    return jnp.asarray([[*ids, *[0] * ((slots or len(ids)) - len(ids))]], jnp.int32)


def read(
    model: Model, ids: Sequence[int], needs: kvjax.Needs, slots: int | None = None
) -> tuple[kvjax.StepOutput, float]:
    """Reads a prompt, one compiled layer after another: what came out, and the seconds it took.

    With `slots` it is padded to so many tokens, so that prompts of several lengths share what was compiled.
    """
    tokens = padded(ids, slots)
    index = jnp.arange(tokens.shape[1])
    positions = jnp.where(index < len(ids), index, -1)[None]
    start = time.perf_counter()
    cache = prompt_cache(model.config, 1, model.params.embed.dtype)
    out = bind(model.params, model.config)(tokens, positions, cache, needs=needs, last_only=True)
    jax.block_until_ready(out)
    return out, time.perf_counter() - start


def compress(
    model: Model,
    method: Method,
    out: kvjax.StepOutput,
    ids: Sequence[int],
    *,
    room: int,
    call_tokens: int = 1,
    slots: int | None = None,
) -> kvjax.Run:
    """The run of one method after a prompt that `read` read with the same `slots`."""
    lengths, tokens = jnp.asarray([len(ids)]), padded(ids, slots)
    seen = Observation(
        tuple(_narrow(layer, method.transform.schedule.needs) for layer in out.layers),
        new=lengths,
        prompt=lengths,
        prompt_slots=tokens.shape[1],
    )
    lm = kvjax.bind(bind(model.params, model.config), method.transform)
    return lm.start(out, seen, room=room, call_tokens=call_tokens, tokens=tokens)


def _narrow(layer: kvjax.LayerObservation, needs: kvjax.Needs) -> kvjax.LayerObservation:
    """What one method asked for, from an observation that serves several."""
    queries, lse = last_queries(layer.queries, layer.lse, needs.queries)
    return layer.replace(queries=queries, lse=lse)
