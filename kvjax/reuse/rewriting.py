"""Reads tokens again where they are, in a cache that holds others there or what was read apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from kvjax.cache import Cache
from kvjax.drivers import Run, Step, StepOutput
from kvjax.limits import can_be_seen
from kvjax.observation import Needs
from kvjax.reuse.material import without


def rewritten(
    step: Step, cache: Cache, tokens: Int32[Array, "B T"], positions: Int32[Array, "B T"], *, room: int | None = None
) -> StepOutput:
    """Reads given tokens again where they are, or reads others there: their old slots are emptied first.

    The tokens see all that the cache holds at lower positions, and each other: with every token of a text this is a
    prefill, with none it changes nothing. They are stored as new tokens are. Where a cache has dropped tokens, what is
    read again does not see them.

    Args:
      step: the decoder.
      cache: of any representation.
      tokens: i32[B, T].
      positions: i32[B, T], increasing in a row; -1 is padding, which comes last. From `length` on they make it longer.
      room: slots to add for them. None: T, which is always enough; 0 is, where slots are written one by one and every
        head of every row has them.

    Returns:
      Logits f32[B, 1, V] after the last of each row's tokens, and the cache.

    Raises:
      ValueError: shapes, or positions that are not in order or are shared by rows where they can be seen (inside
        `jax.jit` logits of such rows are NaN); slots stand for several tokens.
    """
    rows = cache.length.shape[0]
    if tokens.shape != positions.shape or tokens.ndim != 2 or tokens.shape[0] != rows:
        got = f"{list(tokens.shape)} and {list(positions.shape)}"
        raise ValueError(f"tokens and positions must be [{rows}, T], got {got}.")
    _check_increasing(positions)
    T = tokens.shape[1]
    if T < 2:  # a single token would take the place of a ring's oldest
        tokens, positions = (jnp.pad(x, ((0, 0), (0, 2 - T)), constant_values=-1) for x in (tokens, positions))
    emptied = without(cache, lambda pos: _is_in(pos, positions))
    wrong = _shared_changed(cache, emptied)
    out = step(tokens, positions, emptied.reserve(T if room is None else room), needs=Needs(), last_only=True)
    return out._replace(logits=jnp.where(wrong, jnp.nan, out.logits), cache=out.cache.constrained())


def rewrite(step: Step, run: Run, tokens: jax.Array, positions: jax.Array, *, room: int | None = None) -> Run:
    """Reads given tokens of a run again where they are: see `rewritten`.

    The method that made the run does not act, and a budget is met again when it next does. Where tokens make a row
    longer, it is as if the prompt had been longer: the room for what follows stays.

    Returns:
      The run; its logits are new where the row's last token was read again.
    """
    out = rewritten(step, run.cache, tokens, positions, room=room)
    of_last = out.logits[:, 0]
    newest = (jnp.max(positions, axis=1) + 1 >= out.cache.length) | jnp.any(jnp.isnan(of_last), axis=-1)
    logits = jnp.where(newest[:, None], of_last, run.logits)
    return run._replace(logits=logits, cache=out.cache, prompt=run.prompt + out.cache.length - run.cache.length)


def _is_in(pos: jax.Array, positions: jax.Array) -> jax.Array:
    """bool[b, K, S]: whether a slot's position is among those i32[B, T] of its row.

    Of slots that several rows share: whether it is among those of any of them.
    """
    ordered = jnp.sort(positions.reshape(pos.shape[0], -1), axis=-1)
    at = jax.vmap(jnp.searchsorted)(ordered, pos.reshape(pos.shape[0], -1)).reshape(pos.shape)
    at = jnp.minimum(at, ordered.shape[1] - 1)
    return jnp.take_along_axis(ordered, at.reshape(pos.shape[0], -1), axis=1).reshape(pos.shape) == pos


def _shared_changed(cache: Cache, emptied: Cache) -> jax.Array:
    """Whether slots that several rows share were emptied: refused where it can be seen, as one row's own business."""
    B = cache.length.shape[0]
    pairs = zip(cache.inlined().layers, emptied.inlined().layers)
    shared = [(s.pos, t.pos) for a, b in pairs for s, t in zip(a.segments, b.segments) if s.pos.shape[0] != B]
    changed = [jnp.any(before != after) for before, after in shared]
    wrong = jnp.any(jnp.stack(changed)) if changed else jnp.asarray(False)
    if can_be_seen(wrong) and wrong:
        raise ValueError("positions must be of tokens that each row has of its own; some are in slots that rows share.")
    return wrong


def _check_increasing(positions: jax.Array) -> None:
    if not can_be_seen(positions):
        return
    for row in np.asarray(positions):
        real = row[row >= 0]
        if (np.diff(real) <= 0).any() or (row[: len(real)] < 0).any() or (row < -1).any():
            raise ValueError(f"positions must increase in every row, with -1 at its end, got {row.tolist()}.")
