"""Drafts: tokens that are read beside a cache, of which the accepted ones are then written into it.

`peek` writes nothing, so that a method has evicted nothing and rounded nothing when tokens turn out to be wrong;
`commit` writes some of them and lets the method act as if these alone had come. Both work with every representation.
Taking tokens back out (`truncate`) is exact in few.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from kvjax.drivers import Run, Step, going_on, logits_after, next_positions, tokens_left
from kvjax.limits import can_be_seen, check_tokens, limits_of, longest_row, readable
from kvjax.observation import ALL, LayerObservation, Needs, Observation, observe
from kvjax.segments.drafted import DraftedTokens
from kvjax.segments.moves import written_after
from kvjax.transforms.base import CacheTransform


class Draft(NamedTuple):
    """Tokens that a decoder has read behind a run, and what `commit` needs to write any number of them."""

    logits: Float32[Array, "B T V"]  # after each of them; NaN in rows that were refused
    new: tuple[DraftedTokens, ...]  # of each layer
    layers: tuple[LayerObservation, ...]  # of all T queries, where the method looks at any
    first: Int32[Array, " B"]  # position of the first
    lengths: Int32[Array, " B"]  # tokens of each row

    def padded(self, tokens: int) -> Draft:
        """Adds padding up to so many tokens."""
        more = tokens - self.logits.shape[1]
        pad = lambda x, fill=0: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)

        def observed(layer: LayerObservation) -> LayerObservation:
            if not layer.queries.pos.shape[1]:
                return layer
            queries = layer.queries._replace(raw=pad(layer.queries.raw), pos=pad(layer.queries.pos, -1))
            return layer.replace(queries=queries, lse=pad(layer.lse))

        new, layers = (tuple(x.padded(tokens) for x in self.new), tuple(map(observed, self.layers)))
        return self._replace(logits=pad(self.logits), new=new, layers=layers)


def peek(
    step: Step,
    transform: CacheTransform,
    run: Run,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"] | None = None,
) -> Draft:
    """Reads T given tokens behind a run, in one call, and writes nothing: the run stays as it is.

    Args:
      step: the decoder.
      transform: the method that made the run.
      run: the sequence so far; it needs no room for the tokens.
      tokens: i32[B, T], padded at the end with any ids.
      lengths: i32[B], real tokens of each row, 0 for a row that rests; None: T.

    Returns:
      The logits after each token, and what `commit` writes.

    Raises:
      ValueError: tokens or lengths are impossible (see `kvjax.extend`), the method is not that of the run, or it
        looks at the largest inputs of every call (`Needs.largest_inputs`), which cannot be told apart by token.
    """
    lengths = jnp.full(tokens.shape[:1], tokens.shape[-1], jnp.int32) if lengths is None else lengths
    check_tokens(tokens, lengths, run.cache)
    run.room.check_method(transform.schedule.described)
    right = readable(limits_of(step), tokens, lengths, run.cache.length, least=0)
    right, lengths = going_on(right, lengths, run.logits)
    if getattr(step, "donate", False):  # the cache is read here and written by commit
        step = dataclasses.replace(step, donate=False)
    behind = DraftedTokens.empty(tokens.shape[0])
    cache = run.cache.map_layers(lambda layer: layer.replace(segments=(*layer.segments, behind)))
    positions = next_positions(run.cache, lengths, tokens.shape[1])
    out = step(tokens, positions, cache, needs=_needs(transform), last_only=False)
    new = tuple(layer.segments[-1] for layer in out.cache.layers)
    return Draft(jnp.where(right[:, None, None], out.logits, jnp.nan), new, out.layers, run.cache.length, lengths)


def commit(transform: CacheTransform, run: Run, draft: Draft, count: Int32[Array, " B"]) -> Run:
    """Writes the first tokens of a draft into the cache, each row its own number; the method acts on exactly these.

    All of them are what `kvjax.extend` would have made of the run, and none change nothing.

    Args:
      transform: the method that made the run.
      run: what the draft was read behind.
      draft: of `peek`.
      count: i32[B], from 0 to the tokens of the draft's row.

    Raises:
      ValueError: count is impossible, there is no room, or the draft was read behind another run; what only values can
        tell: see `kvjax.limits`.
    """
    B, T = draft.logits.shape[:2]
    if not hasattr(count, "shape") or count.shape != (B,) or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(f"count must be {B} integers, one for each row, got {getattr(count, 'shape', count)}.")
    run.room.check_method(transform.schedule.described)
    run.room.check_call(longest_row(count, T))
    _check_commit(run, draft, count)
    return committed(transform, run, draft, count)


def committed(transform: CacheTransform, run: Run, draft: Draft, count: jax.Array) -> Run:
    """Does what `commit` does, for a caller who knows that there is room: a row without it becomes NaN."""
    T, left = draft.logits.shape[1], tokens_left(run)
    right = (count >= 0) & (count <= draft.lengths) & (draft.first == run.cache.length)
    right = right if left is None else right & (count <= left)
    right, count = going_on(right, count, run.logits)
    pos = next_positions(run.cache, count, T)
    read = run.cache.inlined().layers  # what was read is written after the reading, in place

    def write(layer, new: DraftedTokens, whole):
        k, v = new.k, new.v
        if whole.segments[-1].pos.shape[-1]:
            k, v, at = written_after(draft.logits, k, v, pos)
            return layer.append(k, v, at, new.rope)
        return layer.append(k, v, pos, new.rope)

    cache = run.cache.map_layers(write, draft.new, read)
    cache = cache.replace(length=run.cache.length + count)
    seen = Observation(
        tuple(_observed(layer, transform.schedule.needs, count) for layer in draft.layers),
        new=count,
        prompt=run.prompt,
        prompt_slots=run.room.prompt_slots,
        first=run.first,
        phase="decode",
    )
    cache, state = transform.step(cache, run.state, seen)
    logits, _ = logits_after(draft.logits, run.logits, right, count)
    return run._replace(logits=logits, cache=cache.constrained(), state=state)


def truncate(transform: CacheTransform, run: Run, length: Int32[Array, " B"], logits: Float32[Array, "B V"]) -> Run:
    """Takes the newest tokens out of a run again; their room is free again.

    This is exact where nothing was lost when they came: the method does not act on later tokens, and every layer
    writes them one by one into slots of their own. A ring has lost the tokens that they replaced, and blocks of codes
    would keep holes: `peek` reads tokens without writing them, whatever the cache.

    Args:
      transform: the method that made the run.
      run: the sequence so far.
      length: i32[B], tokens that stay of each row: at least those of its prompt, at most all.
      logits: f32[B, V], after the last token that stays; of rows that stay as they are it does not matter.

    Raises:
      ValueError: the method or a layer has no exact way back, says which; or length is impossible.
    """
    run.room.check_method(transform.schedule.described)
    if "decode" in transform.schedule.acts_in:
        raise ValueError(
            f"truncate is exact where tokens after the prompt stay as they are, and {transform.schedule.name} acts on "
            "them: read with peek what may turn out to be wrong."
        )
    for index, layer in enumerate(run.cache.layers):
        tail = layer.segments[-1]
        if not (getattr(tail, "by_slot", False) and tail.layout.grows and tail.bias is None):
            is_ring = not getattr(getattr(tail, "layout", None), "grows", True)
            found = "a ring" if is_ring else f"a {type(tail).__name__}"
            raise ValueError(
                f"truncate needs tokens in slots of their own, but layer {index} writes them into {found}: read with "
                "peek what may turn out to be wrong."
            )
    cache = run.cache
    start = run.prompt if run.first is None else run.first + run.prompt
    right = (length >= start) & (length <= cache.length)
    if can_be_seen(right) and not np.asarray(right).all():
        row = int(np.argmin(np.asarray(right)))
        raise ValueError(
            f"length must be from the {int(start[row])} tokens of the prompt to the {int(cache.length[row])} that were "
            f"read, got {int(length[row])} in row {row}."
        )
    length = jnp.where(right, length, cache.length)
    drop = lambda tail: tail.drop(tail.pos >= length[:, None, None])
    shorter = cache.map_layers(lambda layer: layer.with_tail(drop(layer.segments[-1]))).replace(length=length)
    after = jnp.where((length < cache.length)[:, None], logits, run.logits)
    return run._replace(cache=shorter, logits=jnp.where(right[:, None], after, jnp.nan))


def _needs(transform: CacheTransform) -> Needs:
    """What a method that acts on accepted tokens must be told about all tokens."""
    schedule = transform.schedule
    if "decode" not in schedule.acts_in:
        return Needs()
    if schedule.needs.largest_inputs:
        raise ValueError(f"{schedule.name} looks at the largest inputs of a call, which a draft cannot tell apart.")
    return Needs(queries=ALL if schedule.needs.queries or schedule.needs.moments_from else 0)


def _observed(layer: LayerObservation, needs: Needs, count: jax.Array) -> LayerObservation:
    """What the decoder would have reported, had the first tokens alone come."""
    queries = layer.queries
    T = queries.pos.shape[1]
    if not T:
        return layer
    queries = queries._replace(pos=jnp.where(jnp.arange(T) < count[:, None], queries.pos, -1))
    return observe(queries, layer.lse, needs, layer.layer, window=layer.window, scale=layer.scale)


def _check_commit(run: Run, draft: Draft, count: jax.Array) -> None:
    given = (count, draft.lengths, draft.first, run.cache.length)
    if not all(map(can_be_seen, given)):
        return
    count, lengths, first, length = map(np.asarray, given)
    if (first != length).any():
        raise ValueError(
            f"draft must be read behind this run, whose rows have {length.tolist()} tokens, got one behind "
            f"{first.tolist()}."
        )
    wrong = (count < 0) | (count > lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"count must be from 0 to the draft's {lengths[row]} tokens, got {count[row]} in row {row}.")
    left = tokens_left(run)
    if left is not None and can_be_seen(left) and (count > np.asarray(left)).any():
        row = int(np.argmax(count > np.asarray(left)))
        raise ValueError(f"count must fit the room that a row has left, got {count[row]} in row {row}.")
