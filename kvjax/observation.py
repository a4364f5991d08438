"""What a transform may look at, and how it asks for it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int32

from kvjax.prompt_attention import PromptAttention
from kvjax.segments.protocol import Queries
from kvjax.segments.slots import without_rounding
from pallas_kernels.logits import Scale

ALL = -1
"""`Needs.queries` for every query of the call."""

Phase = Literal["begin", "prefill", "decode"]
"""Before the first chunk of a prompt, when nothing is read yet; up to the prompt's end; after it."""


class Instruction(NamedTuple):
    """Token ids that ask a decoder to repeat what it has read; without any, the text is simply read again."""

    first: tuple[int, ...] = ()  # asks for the beginning
    later: tuple[int, ...] = ()  # asks for what follows some tokens, which come next
    answer: tuple[int, ...] = ()  # lets the answer begin


class Reread(NamedTuple):
    """A prompt read once more behind itself, chunk by chunk; see `kvjax.reread`."""

    chunk: int = 2048  # tokens
    sinks: int = 4  # first tokens of the prompt, which every chunk is weighed against
    overlap: int = 8  # tokens before a chunk that are quoted after `Instruction.later`
    instruction: Instruction = Instruction()


class Needs(NamedTuple):
    """What a transform asks the decoder to collect; nothing else is."""

    queries: int = 0  # the last W queries of each row and their lse; ALL for every query
    moments_from: tuple[int, ...] = ()  # the moments of all queries from each of these positions on
    largest_inputs: int = 0  # which tokens own the n largest entries of what a layer reads
    reread: Reread | None = None  # what every token of the prompt receives when the prompt is read again
    prompt_attention: PromptAttention | None = None  # how a prompt attends to itself; None: to everything before

    def union(self, other: Needs) -> Needs:
        """What serves both.

        Raises:
          ValueError: both read the prompt again, or both choose how it attends to itself, but not in the same way.
        """
        widest = max(self.queries, other.queries)
        rereads = {n.reread for n in (self, other)} - {None}
        if len(rereads) > 1:
            raise ValueError(f"methods that read a prompt again must do so in the same way, got {sorted(rereads)}.")
        attentions = {n.prompt_attention for n in (self, other)} - {None}
        if len(attentions) > 1:
            raise ValueError(f"a prompt attends to itself in one way, got several: {sorted(map(str, attentions))}.")
        return Needs(
            queries=ALL if ALL in (self.queries, other.queries) else widest,
            moments_from=tuple(sorted({*self.moments_from, *other.moments_from})),
            largest_inputs=max(self.largest_inputs, other.largest_inputs),
            reread=next(iter(rereads), None),
            prompt_attention=next(iter(attentions), None),
        )


class QueryMoments(NamedTuple):
    """Sums over the un-rotated queries of a row, and how large the rotated ones become; two calls can be joined."""

    count: Float32[Array, " B"]
    first: Float32[Array, "B N H"]
    second: Float32[Array, "B N H H"]
    peak: Float32[Array, "B N H"]  # the largest |q| of every rotated channel

    @classmethod
    def of(cls, queries: Queries, start: int) -> QueryMoments:
        """Of the queries at position `start` or later."""
        counted = (queries.pos >= start).astype(jnp.float32)  # [B, T]; padding is at -1
        raw = jnp.where(counted[..., None, None] > 0, queries.raw.astype(jnp.float32), 0.0)
        rotated = jnp.abs(queries._replace(raw=raw).rotated)
        second = jnp.einsum("btnh,btni->bnhi", raw, raw)
        return cls(jnp.sum(counted, axis=1), jnp.sum(raw, axis=1), second, jnp.max(rotated, axis=1, initial=0.0))

    def plus(self, other: QueryMoments) -> QueryMoments:
        """Those of both together."""
        return QueryMoments(*(a + b for a, b in zip(self[:-1], other[:-1])), jnp.maximum(self.peak, other.peak))


class LargestInputs(NamedTuple):
    """The n largest |entries| of a layer's input (the residual stream), largest first, and whose they are.

    A token may own several; where there are fewer entries the rest are 0 and -1.
    """

    size: Float32[Array, "B n"]
    pos: Int32[Array, "B n"]  # token positions

    @classmethod
    def of(cls, inputs: jax.Array, pos: jax.Array, count: int) -> LargestInputs:
        """Of inputs [B, T, D] at positions i32[B, T]."""
        # Only the tokens with the `count` highest peaks can own any of the `count` largest entries.
        x = without_rounding(jnp.abs(inputs.astype(jnp.float32)))  # equal tokens have equal entries
        x = jnp.where((pos >= 0)[..., None], x, -1.0)
        _, token = jax.lax.top_k(jnp.max(x, axis=-1), min(count, x.shape[1]))
        token = jnp.sort(token, axis=1)  # of equal entries the first count, however the prompt came
        entries = jnp.take_along_axis(x, token[..., None], axis=1)  # [B, tokens, D]
        owner = jnp.broadcast_to(jnp.take_along_axis(pos, token, axis=1)[..., None], entries.shape)
        flat = lambda y, fill: jnp.pad(y.reshape(y.shape[0], -1), ((0, 0), (0, count)), constant_values=fill)
        return cls._top(flat(entries, -1.0), flat(owner, -1), count)

    def plus(self, other: LargestInputs) -> LargestInputs:
        """Those of both together."""
        size, pos = (jnp.concatenate(pair, axis=1) for pair in zip(self, other))
        return self._top(size, pos, self.size.shape[1])

    @classmethod
    def _top(cls, size: jax.Array, pos: jax.Array, count: int) -> LargestInputs:
        size, index = jax.lax.top_k(size, count)
        pos = jnp.take_along_axis(pos, index, axis=1)
        return cls(jnp.maximum(size, 0.0), jnp.where(size < 0, -1, pos).astype(jnp.int32))


class Quota(NamedTuple):
    """What a selection of slots will keep, for scorers whose scores depend on it."""

    rows: Int32[Array, " B"]  # slots that each head of a row may keep
    protected: Bool[Array, "B K S"]  # those among them that are kept in any case

    def free(self, share: float = 1.0) -> jax.Array:
        """Returns i32[B, K]: how many slots beside the protected may stay, or a share of them."""
        left = jnp.maximum(self.rows[:, None] - jnp.sum(self.protected, axis=-1), 0)
        return jnp.floor(share * left + 1e-3).astype(jnp.int32)


@struct.dataclass
class LayerObservation:
    """What one layer saw in the last call of the decoder."""

    queries: Queries  # W of them, un-rotated; padding (pos -1) where a row has fewer
    lse: Float32[Array, "B W N"]  # over everything each query attended to
    layer: jax.Array  # i32[], its index
    moments: dict[int, QueryMoments] = struct.field(default_factory=dict)  # of the call, or of the prompt at its end
    largest: LargestInputs | None = None  # of the call, or of the prompt at its end
    reread: Float32[Array, "B K S"] | None = None  # by token: the largest probability while the prompt was reread
    learned: Any = None  # the layer's arrays of a trained scorer; see `kvjax.transforms.learned`
    prompt: Int32[Array, " B"] | None = None  # tokens of the whole prompt, where a transform passes them on
    first: Int32[Array, " B"] | None = None  # position of the prompt's first token; None: 0
    quota: Quota | None = None  # what the scores are for, where every head of a row keeps the same number of slots
    window: int | None = struct.field(pytree_node=False, default=None)
    scale: Scale | None = struct.field(pytree_node=False, default=None)

    @property
    def prompt_end(self) -> Int32[Array, " B"]:
        """i32[B], position of the first token behind the prompt."""
        return self.prompt if self.first is None else self.first + self.prompt

    @property
    def sums(self) -> tuple[dict[int, QueryMoments], LargestInputs | None]:
        """What `with_sums` adds up over calls."""
        return self.moments, self.largest

    def with_sums(self, moments: dict[int, QueryMoments], largest: LargestInputs | None) -> LayerObservation:
        """The same with what was seen before added to its moments and to its largest inputs."""
        both = {start: moments[start].plus(new) for start, new in self.moments.items()}
        return self.replace(moments=both, largest=largest and largest.plus(self.largest))


@struct.dataclass
class Observation:
    """What the whole decoder saw in its last call.

    `prompt` is the length of the whole prompt, known from the start even when it arrives in chunks:
    budgets that are fractions refer to it.
    """

    layers: tuple[LayerObservation, ...]
    new: Int32[Array, " B"]  # tokens of this call
    prompt: Int32[Array, " B"]  # tokens of the whole prompt
    prompt_slots: int = struct.field(pytree_node=False)  # the longest prompt of the batch, static
    first: Int32[Array, " B"] | None = None  # position of the prompt's first token; None: 0
    phase: Phase = struct.field(pytree_node=False, default="prefill")
    room: int | None = struct.field(pytree_node=False, default=None)  # tokens that will follow the prompt, if known
    grows: bool = struct.field(pytree_node=False, default=False)  # the cache makes room for each of them by itself

    def each_layer(self) -> tuple[LayerObservation, ...]:
        """Returns what every layer saw, with where the prompt lies."""
        return tuple(layer.replace(prompt=self.prompt, first=self.first) for layer in self.layers)

    def slots_of(self, budget: int, *, grows: bool | None = None) -> int:
        """Returns the slots that a budget of tokens needs: no more than there can be tokens, where that is known.

        Args:
          budget: tokens per KV head.
          grows: whether room for the tokens that follow is added to these slots; None: as the cache does.
        """
        if self.grows if grows is None else grows:
            return min(budget, self.prompt_slots)
        return budget if self.room is None else min(budget, self.prompt_slots + self.room)


def observe(
    queries: Queries,
    lse: Float32[Array, "B T N"],
    needs: Needs,
    layer: jax.Array,
    *,
    inputs: Float[Array, "B T D"] | None = None,
    **how,
) -> LayerObservation:
    """What a decoder reports of one layer.

    Args:
      queries: of the call, un-rotated.
      lse: f32[B, T, N], over everything they attended to.
      needs: what was asked for.
      layer: i32[], index of the layer.
      inputs: [B, T, D], what the layer reads.
      **how: the layer's `window` and `scale`, where it has its own.
    """
    moments = {start: QueryMoments.of(queries, start) for start in needs.moments_from}
    largest = None
    if needs.largest_inputs:
        if inputs is None:
            raise ValueError("inputs are wanted by a transform, but the decoder does not report what its layers read.")
        largest = LargestInputs.of(inputs, queries.pos, needs.largest_inputs)
    picked = last_queries(queries, lse, needs.queries)
    return LayerObservation(*picked, layer=layer, moments=moments, largest=largest, **how)


def last_queries(queries: Queries, lse: Float32[Array, "B T N"], count: int) -> tuple[Queries, jax.Array]:
    """The last `count` real queries of every row (all of them for ALL), in order, right-aligned.

    Args:
      queries: raw [B, T, N, H], pos i32[B, T] with padding (-1) last.
      lse: f32[B, T, N].
      count: W, or ALL.

    Returns:
      The same with W = min(count, T) entries; a row with fewer real ones starts with padding.
    """
    T = queries.pos.shape[1]
    if count == ALL or count >= T:
        return queries._replace(ahead=0), lse
    take = lambda x, **how: take_last(x, queries.pos, count, **how)
    return Queries(take(queries.raw), take(queries.pos, fill=-1), queries.rope), take(lse)


def take_last(
    x: Float[Array, "B T ..."], pos: Int32[Array, "B T"], count: int, *, fill: int | None = None
) -> Float[Array, "B count ..."]:
    """The entries of the last `count` real tokens of every row, in order, right-aligned.

    Args:
      x: [B, T, ...].
      pos: i32[B, T], padding (-1) last.
      count: at most T.
      fill: what stands where a row has fewer; None: its first entry.

    Returns:
      [B, count, ...].
    """
    real = jnp.sum(pos >= 0, axis=1)
    index = real[:, None] - count + jnp.arange(count)  # [B, count]
    expand = (...,) + (None,) * (x.ndim - 2)
    taken = jnp.take_along_axis(x, jnp.maximum(index, 0)[expand], axis=1)
    return taken if fill is None else jnp.where((index >= 0)[expand], taken, fill)


def quota_of(seen: LayerObservation, scorer: str) -> Quota:
    """Returns what a selection will keep.

    Raises:
      TypeError: heads keep different numbers of slots, or nobody said how many; names the scorer.
    """
    if seen.quota is None:
        raise TypeError(f"{scorer} scores slots for a known budget of each head: use it in evict or merge.")
    return seen.quota


def newest(seen: LayerObservation, count: int) -> LayerObservation:
    """The same with all but the last `count` queries of every row made padding.

    For what wants a few queries in a composition where something else wants more.
    """
    pos = seen.queries.pos
    last = jnp.max(pos, axis=1, keepdims=True, initial=-1)
    return seen.replace(queries=seen.queries._replace(pos=jnp.where(pos > last - count, pos, -1)))


def of_head(seen: LayerObservation, head: jax.Array, kv_heads: int) -> LayerObservation:
    """What one of the K KV heads saw: its query group, its moments."""

    def mine(x, axis):
        group = x.shape[axis] // kv_heads
        return jax.lax.dynamic_slice_in_dim(x, head * group, group, axis=axis)

    moments = {
        start: QueryMoments(of.count, *(mine(x, 1) for x in of[1:])) for start, of in seen.moments.items()
    }
    return seen.replace(
        queries=seen.queries._replace(raw=mine(seen.queries.raw, 2)),
        lse=mine(seen.lse, 2),
        moments=moments,
        reread=None if seen.reread is None else mine(seen.reread, 1),
    )
