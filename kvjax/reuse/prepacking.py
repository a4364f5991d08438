"""Prepacking: short prompts read one behind the other in the same rows, instead of each in a padded row.

Zhao, Israel, Van den Broeck, Grover. "Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in Large
Language Models". AISTATS 2025. arXiv:2404.09529.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from kvjax.cache import Cache, LayerCache
from kvjax.drivers import Run, Step, StepOutput, start
from kvjax.limits import check_positions, check_tokens, limits_of, readable
from kvjax.observation import ALL, LayerObservation, Needs, Observation, observe
from kvjax.segments.protocol import Queries
from kvjax.transforms.base import CacheTransform
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial
from pallas_kernels.prefill_attention import prefill_attention


class OwnPrompt(NamedTuple):
    """Attention of rows of several prompts, whose positions begin at 0 again: a token sees those of its prompt alone.

    For the masks, the prompts of a row of C tokens lie 2 C positions apart, and a window of C tokens ends in between.
    """

    def __call__(
        self,
        q: Float[Array, "R C N H"],
        k: Float[Array, "R K C H"],
        v: Float[Array, "R K C H"],
        pos: Int32[Array, "R C"],
        *,
        window: int | None = None,
        scale: Scale | None = None,
    ) -> Partial:
        """Attends as `prefill_attention` does, to tokens of the same prompt."""
        C = pos.shape[1]
        prompt = jnp.cumsum(pos == 0, axis=1) - 1
        pos = jnp.where(pos < 0, -1, 2 * C * prompt + pos)
        return prefill_attention(q, k, v, pos, window=C if window is None else min(window, C), scale=scale)


def packed_rows(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Shares prompts out over as few rows as first-fit decreasing finds: the longest first, each into the first row.

    Args:
      lengths: tokens of each prompt; one of 0 takes no place.
      capacity: tokens of a row.

    Returns:
      The prompts of every row, in the order they lie in it.

    Raises:
      ValueError: a prompt is longer than a row.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"capacity must be at least the longest prompt's {max(lengths)} tokens, got {capacity}.")
    rows: list[list[int]] = []
    left: list[int] = []
    for prompt in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((i for i, free in enumerate(left) if lengths[prompt] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(capacity)
        rows[row].append(prompt)
        left[row] -= lengths[prompt]
    return [tuple(row) for row in rows]


def prepacking(
    step: Step,
    transform: CacheTransform,
    prompts: Sequence[Sequence[int]],
    empty_cache: Callable[[int], Cache],
    *,
    room: int,
    call_tokens: int = 1,
    capacity: int | None = None,
) -> Run:
    """Reads prompts in shared rows, and returns the run that `prefill` makes of them in a padded batch.

    All tokens of a prompt but the last are read in rows of `capacity` tokens, with positions and masks of their own;
    the last ones follow in one call for all prompts, which leaves the logits. What compresses sees what it would have
    seen of the padded batch. With P prompts of at most T tokens in R rows, `R * capacity + P` tokens are computed, not
    `P * T`.

    Deviations: rows are filled by first-fit decreasing, and have room for the tokens without the last one of each.

    Args:
      step: the decoder, which must heed `Needs.prompt_attention` as `models` do.
      transform: what compresses, when the prompts are in.
      prompts: token ids, each at least one.
      empty_cache: makes a cache without slots for so many rows, as `BoundDecoder.empty_cache` does.
      room: tokens that will follow, over all later calls.
      call_tokens: the most tokens a later call brings at once.
      capacity: tokens of a row; None: one less than the longest prompt.

    Raises:
      ValueError: prompts, capacity or room are impossible; or the transform puts something before the prompt, chooses
        what it reads, reads it again or wants the largest inputs of layers.
    """
    schedule = transform.schedule
    _check(schedule)
    if not len(prompts) or not all(map(len, prompts)):
        raise ValueError(f"prompts must be at least one, of at least 1 token each, got {[len(p) for p in prompts]}.")
    lengths = np.int32([len(prompt) for prompt in prompts])
    P, T = len(prompts), int(lengths.max())
    tokens = np.zeros((P, T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    cache, limits = empty_cache(P), limits_of(step)
    check_tokens(tokens, lengths, cache)
    readable(limits, jnp.asarray(tokens), jnp.asarray(lengths), cache.length, least=1)
    check_positions(limits, T + room, f"a prompt of {T} tokens with room for {room} more")
    collected = Needs(queries=ALL if schedule.needs.queries or schedule.needs.moments_from else 0)
    last, before_last = np.take_along_axis(tokens, lengths[:, None] - 1, axis=1), lengths - 1
    if T > 1:
        capacity = T - 1 if capacity is None else capacity
        rows = packed_rows(before_last.tolist(), capacity)
        packed, pos, row, place = _laid_out(tokens, before_last, rows, capacity)
        needs = collected._replace(prompt_attention=OwnPrompt())
        first = step(packed, pos, empty_cache(len(rows)), needs=needs, last_only=True)
        layers = tuple(_unpacked(layer, row, place) for layer in first.cache.layers)
        cache = cache.replace(layers=layers, length=jnp.asarray(before_last)).reserve(1)
    out = step(jnp.asarray(last), jnp.asarray(before_last[:, None]), cache, needs=collected, last_only=True)
    lengths = jnp.asarray(lengths)
    if T > 1:
        cache = out.cache.map_layers(lambda layer: layer.with_tail(layer.segments[-1].first(T)))
        seen = lambda *layers: _seen(*layers, row, place, lengths, needs=schedule.needs)
        out = StepOutput(out.logits, cache, tuple(map(seen, first.layers, out.layers)))
    observation = Observation(out.layers, new=lengths, prompt=lengths, prompt_slots=T, room=room)
    return start(transform, out, observation, room=room, call_tokens=call_tokens)


def _check(schedule) -> None:
    needs = schedule.needs
    refused = {
        "puts something before the prompt": schedule.before is not None,
        "chooses what a prompt reads": needs.prompt_attention is not None,
        "reads the prompt again": needs.reread is not None,
        "wants the largest inputs of layers": needs.largest_inputs > 0,
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"{schedule.name} {what}, which prompts that share rows do not allow: use prefill.")


def _laid_out(tokens: np.ndarray, lengths: np.ndarray, rows: list[tuple[int, ...]], capacity: int):
    """Returns i32[R, C] ids and positions, and where each token of a prompt lies: i32[P] row, i32[P, T] place or -1."""
    ids, pos = np.zeros((len(rows), capacity), np.int32), np.full((len(rows), capacity), -1, np.int32)
    P, T = tokens.shape
    row_of, place = np.zeros((P,), np.int32), np.full((P, T), -1, np.int32)
    for row, prompts in enumerate(rows):
        at = 0
        for prompt in prompts:
            n = lengths[prompt]
            ids[row, at : at + n], pos[row, at : at + n] = tokens[prompt, :n], np.arange(n)
            row_of[prompt], place[prompt, :n] = row, np.arange(at, at + n)
            at += n
    return *map(jnp.asarray, (ids, pos, row_of)), jnp.asarray(place[:, : T - 1])


@jax.jit
def _unpacked(layer: LayerCache, row: jax.Array, place: jax.Array) -> LayerCache:
    """Gives every prompt a row of its own."""

    def of_segment(segment):
        mine = jax.tree.map(lambda x, spec: jnp.take(x, row, axis=0) if _by_row(spec) else x, segment, segment.axes())
        index = jnp.broadcast_to(place[:, None], (*mine.pos.shape[:2], place.shape[1]))
        return mine.take(jnp.maximum(index, 0), index >= 0)

    return layer.with_tail(of_segment(layer.segments[-1]))


def _by_row(spec) -> bool:
    return len(spec) > 0 and spec[0] == "batch"


@functools.partial(jax.jit, static_argnames="needs")
def _seen(
    first: LayerObservation,
    last: LayerObservation,
    row: Int32[Array, " P"],
    place: Int32[Array, "P T-1"],
    lengths: Int32[Array, " P"],
    *,
    needs: Needs,
) -> LayerObservation:
    """Returns what a layer would have reported of a padded batch, from what it saw in rows and of the last tokens."""
    if not (needs.queries or needs.moments_from):
        return last
    at = jnp.arange(place.shape[1] + 1)
    is_last = at == lengths[:, None] - 1

    def own(x, y):
        expand = (...,) + (None,) * (x.ndim - 2)
        mine = jnp.take_along_axis(jnp.take(x, row, axis=0), jnp.maximum(place, 0)[expand], axis=1)
        return jnp.where(is_last[expand], y, jnp.pad(mine, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2)))

    there = at < lengths[:, None]
    raw, lse = own(first.queries.raw, last.queries.raw), own(first.lse, last.lse)
    lse = jnp.where(there[..., None], lse, -jnp.inf)
    queries = Queries(raw, jnp.where(there, at, -1), last.queries.rope)
    return observe(queries, lse, needs, last.layer, window=last.window, scale=last.scale)
