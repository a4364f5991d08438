"""Caches as material: what was read once is moved, cut, put together, read again in parts, and forked.

Masks come from positions, so that a token which is read again where it was sees what it saw, and is seen by what
comes after it, wherever its slot lies. All functions take and return caches or runs of any representation; what a
representation cannot do exactly it refuses. None evicts anything, and all may be jitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, LayerCache
from kvjax.drivers import Run, Step, StepOutput
from kvjax.limits import can_be_seen
from kvjax.observation import Needs
from kvjax.rope import Rope
from kvjax.segments.edits import Edit
from kvjax.segments.tempered import TemperedSegment
from kvjax.transforms.before import with_other_names


def moved(
    cache: Cache, by: int | jax.Array, ropes: Rope | Sequence[Rope], *, start: int = 0, reencode: bool = False
) -> Cache:
    """Moves tokens to other positions: `R(by) R(pos) k = R(pos + by) k`.

    Rotated keys are turned in float32 and stored as they were; keys that are stored un-rotated stay as they are.

    Args:
      cache: of any representation.
      by: tokens, or i32[B] of them.
      ropes: of every layer, or one for all.
      start: tokens before this position stay where they are.
      reencode: keys that are rotated and are codes are decoded, turned and encoded again, with a second rounding.

    Raises:
      ValueError: rotated keys are codes (unless `reencode`) or coordinates; a ring has sinks; slots stand for several
        tokens and some of them stay; a position would be below 0; ropes are not one for each layer.

    Source: He et al., Let the Code LLM Edit Itself When You Edit the Code (2024), arXiv:2407.03157, equation 4.
    """
    by = jnp.asarray(by, jnp.int32)
    ropes = [ropes] * len(cache.layers) if isinstance(ropes, Rope) else list(ropes)
    if len(ropes) != len(cache.layers):
        raise ValueError(f"ropes must be one for each of {len(cache.layers)} layers, got {len(ropes)}.")
    if can_be_seen(by) and int(np.min(np.asarray(by))) + start < 0 and can_be_seen(cache.length):
        first = _first_position(cache, start)
        if first + int(np.min(np.asarray(by))) < 0:
            raise ValueError(f"by must keep positions at 0 or above, got {np.asarray(by).tolist()} and one at {first}.")

    def position(pos: jax.Array) -> jax.Array:
        shift = by if not by.ndim else by.reshape(-1, *[1] * (pos.ndim - 1))
        return jnp.where(pos >= start, pos + shift, pos)

    edit = Edit(position, moves=True, alike=not start, reencode=reencode)
    shared = {name: segment.edited(_of_shared(cache, name, edit, ropes)) for name, segment in cache.shared.items()}
    layers = tuple(_edited(layer, edit._replace(rope=rope)) for layer, rope in zip(cache.layers, ropes))
    length = jnp.where(cache.length > start, cache.length + by, cache.length)
    return cache.replace(layers=layers, shared=shared, length=length)


def without(cache: Cache, gone: Callable[[jax.Array], jax.Array]) -> Cache:
    """Empties slots by position; nothing else moves, and the next token still comes at `cache.length`.

    Args:
      cache: of any representation. Packed blocks are written again when all of their slots are empty.
      gone: i32[B, K, n] positions to bool[B, K, n], or what broadcasts; slots of attached caches have fewer rows.

    Raises:
      ValueError: slots stand for several tokens, which cannot be taken apart.
    """
    edit = Edit(lambda pos: jnp.where(gone(pos), -1, pos))
    return cache.map_layers(lambda layer: _edited(layer, edit)).map_shared(lambda segment: segment.edited(edit))


def joined(*caches: Cache) -> Cache:
    """Puts caches side by side: a query sees the slots of all of them, by their positions.

    The last one's tail takes new tokens, and they come behind the furthest of all. Bytes are those of all. Positions
    may overlap (contexts that were read apart from each other) or follow each other (`moved` first).

    Raises:
      ValueError: there is none, or they are of other layers or rows.
    """
    if not caches:
        raise ValueError("joined needs at least one cache.")
    first = caches[0]
    for cache in caches[1:]:
        if len(cache.layers) != len(first.layers) or cache.length.shape != first.length.shape:
            raise ValueError(
                f"joined needs caches of {len(first.layers)} layers and {first.length.shape[0]} rows, got "
                f"{len(cache.layers)} and {cache.length.shape[0]}."
            )
    shared, parts = {}, []
    for cache in caches:
        parts.append(with_other_names(cache, shared) if set(cache.shared) & set(shared) else cache)
        shared.update(parts[-1].shared)
    side_by_side = lambda *layers: LayerCache(tuple(s for layer in layers for s in layer.segments))
    layers = tuple(map(side_by_side, *(part.layers for part in parts)))
    length = jnp.max(jnp.stack([cache.length for cache in caches]), axis=0)
    return Cache(layers=layers, length=length, shared=shared)


def tempered(cache: Cache, temperature: float, factor: float) -> Cache:
    """Gives everything a cache holds a temperature and a weight of its own in attention; it takes no more tokens.

    See `kvjax.segments.TemperedSegment`; 1 and 1 change nothing. Attach it (`before`), or join it with a cache that
    tokens are appended to.

    Args:
      cache: contexts, side by side (`joined`).
      temperature: logits are divided by it; below 1 attention to the contexts is sharper.
      factor: of the contexts' log-sum-exp, beside the temperature.

    Raises:
      ValueError: temperature or factor is not above 0, or layers share slots.

    Source: Yang et al., APE (2025), arXiv:2502.05431, section 4.
    """
    if temperature <= 0 or factor <= 0:
        raise ValueError(f"temperature and factor must be above 0, got {temperature} and {factor}.")
    if cache.shared:
        raise ValueError(f"tempered needs layers with slots of their own, got shared {sorted(cache.shared)}.")
    return cache.map_layers(lambda layer: LayerCache((TemperedSegment(layer.segments, temperature, factor),)))


def rewritten(
    step: Step, cache: Cache, tokens: jax.Array, positions: jax.Array, *, room: int | None = None
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
      Logits f32[B, T, V] after each of the tokens, and the cache.

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
    out = step(tokens, positions, emptied.reserve(T if room is None else room), needs=Needs(), last_only=False)
    logits = jnp.where(wrong, jnp.nan, out.logits)[:, :T]
    return out._replace(logits=logits, cache=out.cache.constrained())


def rewrite(step: Step, run: Run, tokens: jax.Array, positions: jax.Array, *, room: int | None = None) -> Run:
    """Reads given tokens of a run again where they are: see `rewritten`.

    The method that made the run does not act, and a budget is met again when it next does. Where tokens make a row
    longer, it is as if the prompt had been longer: the room for what follows stays.

    Returns:
      The run; its logits are new where the row's last token was read again.
    """
    out = rewritten(step, run.cache, tokens, positions, room=room)
    last = jnp.argmax(positions, axis=1)
    of_last = jnp.take_along_axis(out.logits, last[:, None, None], axis=1)[:, 0]
    newest = (jnp.max(positions, axis=1) + 1 >= out.cache.length) | jnp.any(jnp.isnan(of_last), axis=-1)
    logits = jnp.where(newest[:, None], of_last, run.logits)
    return run._replace(logits=logits, cache=out.cache, prompt=run.prompt + out.cache.length - run.cache.length)


def taken_rows(run: Run, rows: jax.Array | Sequence[int]) -> Run:
    """Takes rows of a run, any of them any number of times: forks that do not touch each other.

    What all rows share (a single row of slots, an attached cache of one row) stays shared and is not copied; what
    groups of rows share is copied for each row. To share all that was read so far, attach it instead: `before`.

    Args:
      run: of B rows.
      rows: i32[n], from 0 to B - 1.

    Raises:
      ValueError: rows are not a list of integers of these rows, or a method's state cannot be told apart by row.
    """
    B = run.logits.shape[0]
    rows = jnp.asarray(rows, jnp.int32)
    if rows.ndim != 1 or not rows.shape[0]:
        raise ValueError(f"rows must be at least one index in a list, got shape {list(rows.shape)}.")
    if can_be_seen(rows) and (int(rows.min()) < 0 or int(rows.max()) >= B):
        raise ValueError(f"rows must be from 0 to {B - 1}, got {np.asarray(rows).tolist()}.")
    take = lambda x: jnp.take(x, rows, axis=0)

    def of_segment(segment, whole):
        count = whole.pos.shape[0]
        index = rows if count == B else rows // (B // count)
        leaf = lambda x, spec: x if x.shape[0] == 1 < B or not _by_row(spec) else jnp.take(x, index, axis=0)
        return jax.tree.map(leaf, segment, segment.axes())

    whole = run.cache.inlined().layers
    layers = tuple(
        LayerCache(tuple(map(of_segment, layer.segments, of.segments))) for layer, of in zip(run.cache.layers, whole)
    )
    shared = {name: of_segment(segment, segment) for name, segment in run.cache.shared.items()}
    for x in jax.tree.leaves(run.state):
        if x.ndim and x.shape[0] != B:
            raise ValueError(f"taken_rows cannot tell the rows of a method's state apart, got shape {list(x.shape)}.")
    state = jax.tree.map(lambda x: take(x) if x.ndim else x, run.state)
    cache = run.cache.replace(layers=layers, shared=shared, length=take(run.cache.length))
    first = None if run.first is None else take(run.first)
    return run._replace(logits=take(run.logits), cache=cache, state=state, prompt=take(run.prompt), first=first)


def _edited(layer: LayerCache, edit: Edit) -> LayerCache:
    return layer.replace(segments=tuple(segment.edited(edit) for segment in layer.segments))


def _of_shared(cache: Cache, name: str, edit: Edit, ropes: Sequence[Rope]) -> Edit:
    """Returns how what layers share is moved: un-rotated keys as they are, rotated ones if all layers turn alike."""
    views = [
        (view, whole, rope)
        for layer, of, rope in zip(cache.layers, cache.inlined().layers, ropes)
        for view, whole in zip(layer.segments, of.segments)
        if getattr(view, "name", None) == name
    ]
    if all(whole.key_rope in ("at_attend", "rank") for _, whole, _ in views):
        return edit
    if not all(view.shares_keys for view, _, _ in views):
        raise ValueError("Coordinates of rotated keys cannot be moved: the basis is of keys where they were.")
    first = views[0][2]
    if not all(rope is first or np.array_equal(rope.inv_freq, first.inv_freq) for _, _, rope in views):
        raise ValueError("Layers that rotate keys in different ways cannot move what they share.")
    return edit._replace(rope=first)


def _by_row(spec) -> bool:
    return len(spec) > 0 and spec[0] == "batch"


def _first_position(cache: Cache, start: int) -> int:
    """The lowest position from `start` on that any slot holds."""
    held = [np.asarray(segment.pos) for layer in cache.inlined().layers for segment in layer.segments]
    return min((int(pos[pos >= start].min()) for pos in held if (pos >= start).any()), default=start)


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
