"""Moves, cuts and puts together caches of any representation; what one cannot do exactly it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, LayerCache
from kvjax.limits import can_be_seen
from kvjax.rope import Rope
from kvjax.segments.edits import Edit
from kvjax.segments.moves import joined as slots_joined
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
    may overlap (contexts that were read apart from each other) or follow each other (`moved` first). Segments of arrays
    that lie beside each other become one.

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
    layers = tuple(map(_side_by_side, *(part.layers for part in parts)))
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


def detached(cache: Cache, attached: Cache) -> Cache:
    """Takes away the slots that were attached before a run (`kvjax.before`); positions stay.

    Raises:
      ValueError: the cache does not begin with as many segments, or layers share slots.
    """
    if cache.shared or attached.shared:
        raise ValueError("detached needs layers with slots of their own, got some that layers share.")

    def behind(layer: LayerCache, of: LayerCache) -> LayerCache:
        count = len(of.segments)
        if len(layer.segments) <= count:
            raise ValueError(f"detached needs more than the {count} attached segments, got {len(layer.segments)}.")
        return LayerCache(layer.segments[count:])

    return cache.map_layers(behind, attached.layers)


def _side_by_side(*layers: LayerCache) -> LayerCache:
    each = [segment for layer in layers for segment in layer.segments]
    put = each[:1]
    for segment in each[1:]:
        if _one_kind(put[-1], segment):
            put[-1] = slots_joined(put[-1], segment)
        else:
            put.append(segment)
    return LayerCache(tuple(put))


def _one_kind(a, b) -> bool:
    """Whether two segments are arrays of one kind, whose slots may lie in one segment."""
    if not (getattr(a, "is_plain", False) and getattr(b, "is_plain", False)):
        return False
    kind = lambda s: (jax.tree.structure(s), s.layout.grows, s.k.dtype, s.k.shape[:2], s.k.shape[3])
    return kind(a) == kind(b) and a.layout.grows


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


def _first_position(cache: Cache, start: int) -> int:
    """The lowest position from `start` on that any slot holds."""
    held = [np.asarray(segment.pos) for layer in cache.inlined().layers for segment in layer.segments]
    return min((int(pos[pos >= start].min()) for pos in held if (pos >= start).any()), default=start)
