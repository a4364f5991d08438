"""Prompts that are read once, with the full cache, and compressed by several methods."""

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
    """Returns what the decoder must collect for all methods that compress prompts which were read once for all."""
    needs = kvjax.Needs()
    for method in methods:
        if not method.reads_alone:
            needs = needs.union(method.transform.schedule.needs._replace(reread=None))  # each does so by itself
    return needs


def padded(prompts: Sequence[Sequence[int]], slots: int | None = None) -> jax.Array:
    """Returns i32[B, slots]: prompts padded at their ends; None: to the longest."""
    slots = slots or max(map(len, prompts))
    return jnp.asarray([[*ids, *[0] * (slots - len(ids))] for ids in prompts], jnp.int32)


def row_lengths(prompts: Sequence[Sequence[int]]) -> jax.Array:
    """Returns i32[B]: the tokens of each prompt."""
    return jnp.asarray([len(ids) for ids in prompts], jnp.int32)


def read(
    model: Model,
    prompts: Sequence[Sequence[int]],
    needs: kvjax.Needs,
    slots: int | None = None,
    dtype: jnp.dtype | None = None,
) -> tuple[kvjax.StepOutput, float]:
    """Reads prompts, one compiled layer after another: what came out, and the seconds it took.

    Args:
      model: that reads.
      prompts: token ids, one list a row.
      needs: what to collect.
      slots: pad to so many tokens, so that prompts of several lengths share what was compiled; None: to the longest.
      dtype: of the cache; None: the weights'.
    """
    tokens, lengths = padded(prompts, slots), row_lengths(prompts)
    index = jnp.arange(tokens.shape[1])
    positions = jnp.where(index < lengths[:, None], index, -1)
    start = time.perf_counter()
    cache = prompt_cache(model.config, len(prompts), dtype or model.params.embed.dtype)
    out = bind(model.params, model.config)(tokens, positions, cache, needs=needs, last_only=True)
    jax.block_until_ready(out)
    return out, time.perf_counter() - start


def compress(
    model: Model,
    method: Method,
    out: kvjax.StepOutput,
    prompts: Sequence[Sequence[int]],
    *,
    room: int,
    call_tokens: int = 1,
    slots: int | None = None,
) -> kvjax.Run:
    """Returns the run of one method after prompts that `read` read with the same `slots`."""
    lengths, tokens = row_lengths(prompts), padded(prompts, slots)
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
