"""How a prompt attends to itself where it does not read every key: blocks of keys for blocks of queries."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_attention import block_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial, combine, fold
from pallas_kernels.prefill_attention import prefill_attention


class Blocks(NamedTuple):
    """Which blocks of keys the queries of a block read."""

    index: Int32[Array, "B N I P"]  # ascending blocks of keys; -1, behind them: no further one
    cut: Int32[Array, "B N I"]  # blocks that were chosen and found no place among the P
    columns: Int32[Array, "B N C"] | None = None  # ascending keys that all queries behind them read; -1, last: none


class Choice(Protocol):
    """Chooses blocks of keys. Hashable by its numbers: decoders are compiled for one."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        pos: jax.Array,
        *,
        block: int,
        window: int | None,
        scale: Scale | None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Returns f32[B, N, I, I]: what every block of keys is worth to a block of queries; -inf: it is not read.

        What it returns of blocks that lie ahead or hold padding alone does not matter. A pair of that and i32[B, N, C]
        names single keys beside the blocks, see `Blocks.columns`. With `PromptAttention.patterns` it is called with
        one more keyword, `patterns` i32[N], the layer's.

        Args:
          q: [B, I * block, N, H], rotated.
          k: [B, K, I * block, H], rotated.
          pos: i32[B, I * block], -1 = padding, which comes last.
          block: tokens.
          window: tokens a query looks back over, itself included; None: all.
          scale: of the layer's dot products, see `pallas_kernels.logits`.
        """


class PromptAttention(NamedTuple):
    """Attention of a prompt to itself that computes chosen blocks alone.

    Query t of head n sees the keys at or before t that lie in the blocks `Blocks.index[b, n, t // block]`. The choice
    always holds the block of the query itself, so every query sees itself. Blocks are read one after the other and
    merged, as many of them as the head that reads most needs: what is not chosen costs no arithmetic. Columns, where a
    choice has some, are gathered and read in the same way, but not where a chosen block holds them.

    A prompt of no more than one block, a question and generated tokens read everything. So do the last tokens in the
    last layer, where only they go on. Where a prompt comes in chunks, a chunk chooses among its own blocks and reads
    everything before it: less is saved then, the more chunks there are.

    Attributes:
      choose: the choice.
      block: tokens of a block.
      most: fraction of the blocks of a prompt, at least 2, that a block of queries may read: P of them, those that are
        worth most. 1.0: all, and nothing is cut; below, the work is bounded, and `Blocks.cut` counts what was lost.
      patterns: for every layer, a number of each query head that the choice is told. None: it is told none.
    """

    choose: Choice
    block: int = 128
    most: float = 1.0
    patterns: tuple[tuple[int, ...], ...] | None = None

    def of_layer(self, layer: jax.Array, heads: int) -> Int32[Array, " N"]:
        """Returns the patterns of a layer's query heads.

        Raises:
          ValueError: there are more or fewer heads.
        """
        if len(self.patterns[0]) != heads:
            raise ValueError(f"patterns must be of the layer's {heads} query heads, got {len(self.patterns[0])}.")
        return jnp.take(jnp.int32(self.patterns), layer, axis=0)

    def blocks(
        self,
        q: jax.Array,
        k: jax.Array,
        pos: jax.Array,
        patterns: Int32[Array, " N"] | None = None,
        *,
        window: int | None = None,
        scale: Scale | None = None,
    ) -> Blocks:
        """Chooses for a prompt: see `Choice` for the arguments, with any number of tokens."""
        T = q.shape[1]
        q, k, pos = _whole(q, 1, self.block), _whole(k, 2, self.block), _whole(pos, 1, self.block, fill=-1)
        count = pos.shape[1] // self.block
        told = {} if patterns is None else {"patterns": patterns}
        found = self.choose(q, k, pos, block=self.block, window=window, scale=scale, **told)
        worth, columns = found if isinstance(found, tuple) else (found, None)
        there = pos[:, :: self.block] >= 0  # [B, I]
        at = jnp.arange(count)
        own = at[:, None] == at
        possible = (at[:, None] >= at) & (there[:, :, None] & there[:, None])[:, None]  # [B, 1, I, I]
        worth = jnp.where(possible, jnp.where(own, jnp.inf, worth), -jnp.inf)
        places = min(count, max(2, round(self.most * -(-T // self.block))))
        best, index = jax.lax.top_k(worth, places)
        index = jnp.sort(jnp.where(best > -jnp.inf, index, count), axis=-1)
        cut = jnp.sum(worth > -jnp.inf, axis=-1) - jnp.sum(index < count, axis=-1)
        return Blocks(jnp.where(index < count, index, -1).astype(jnp.int32), cut.astype(jnp.int32), columns)

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array, patterns=None, *, window=None, scale=None
    ) -> Partial:
        """Attends as `prefill_attention` does, over the chosen blocks and columns."""
        how = dict(window=window, scale=scale)
        if q.shape[1] <= self.block:
            return prefill_attention(q, k, v, pos, **how)
        chosen = self.blocks(q, k, pos, patterns, **how)
        return attend_blocks(q, k, v, pos, chosen.index, chosen.columns, block=self.block, **how)


def attend_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    pos: Int32[Array, "B T"],
    index: Int32[Array, "B N I P"],
    columns: Int32[Array, "B N C"] | None = None,
    *,
    block: int,
    window: int | None = None,
    scale: Scale | None = None,
) -> Partial:
    """Computes causal attention of a prompt over some blocks of its keys, and over single keys beside them.

    Args:
      q: [B, T, N, H], rotated.
      k: [B, K, T, H], rotated.
      v: [B, K, T, H].
      pos: i32[B, T], increasing, -1 = padding, which comes last.
      index: i32[B, N, I, P], blocks of keys for each of the I blocks of queries; -1, behind them: no further one.
      columns: i32[B, N, C], ascending keys that all later queries of a head read; -1, behind them: no further one.
      block: tokens of a block; I = ceil(T / block).
      window: tokens a query looks back over, itself included; None: all.
      scale: see `prefill_attention`.

    Returns:
      `Partial(out f32[B, T, N, H], lse f32[B, T, N])`; a query that sees nothing is `(0, -inf)`.
    """
    (B, T, N, _), K = q.shape, k.shape[1]
    q, k, v = _whole(q, 1, block), _whole(k, 2, block), _whole(v, 2, block)
    pos = _whole(pos, 1, block, fill=-1)
    how = dict(window=window, scale=scale)
    of_blocks = block_attention(q, k, v, pos, index, block=block, **how)
    trimmed = lambda part: jax.tree.map(lambda x: x[:, :T], part)
    if columns is None:
        return trimmed(of_blocks)
    count = pos.shape[1] // block
    columns = _whole(columns, 2, block, fill=-1)
    queries = lambda x: jnp.moveaxis(x.reshape(B, count, block, *x.shape[2:]), 1, 0)

    def attend(of):
        q, q_pos, index, own = of  # [B, block, N, H], [B, block], [B, N, P], i32[]
        before, alone = _beside(columns, index, own, block, count)

        def part(turn):
            tile = lambda x: jax.lax.dynamic_slice_in_dim(x, turn * block, block, axis=2)  # [B, N, block]
            at, slot_there = jnp.maximum(tile(columns), 0), tile(alone)
            by_head = at.reshape(B, K, N // K * block, 1)
            take = lambda x: jnp.take_along_axis(x, by_head, axis=2).reshape(B, N, block, x.shape[-1])
            slot_pos = jnp.take_along_axis(pos[:, None], at.reshape(B, 1, -1), axis=2).reshape(B, N, block)
            return decode_attention(q, take(k), take(v), q_pos, jnp.where(slot_there, slot_pos, -1), **how)

        return fold(part, -(-jnp.max(jnp.sum(before, axis=-1)) // block))

    parts = jax.lax.map(attend, (queries(q), queries(pos), jnp.moveaxis(index, 2, 0), jnp.arange(count)))
    of_columns = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, count * block, *x.shape[3:]), parts)
    return trimmed(combine([of_blocks, of_columns]))


def keys_read(chosen: Blocks, block: int) -> Int32[Array, "B N I"]:
    """Counts the keys that every block of queries reads, with those of its own block that lie ahead of some of them."""
    read = jnp.sum(chosen.index >= 0, axis=-1) * block
    if chosen.columns is None:
        return read
    count = read.shape[2]
    alone = lambda index, own: jnp.sum(_beside(chosen.columns, index, own, block, count)[1], axis=-1)
    return read + jax.vmap(alone, in_axes=(2, 0), out_axes=2)(chosen.index, jnp.arange(count))


def _beside(
    columns: jax.Array, index: jax.Array, own: jax.Array, block: int, count: int
) -> tuple[jax.Array, jax.Array]:
    """Returns bool[B, N, C]: the columns before a block of queries, and those of them that none of its blocks holds."""
    B, N, _ = columns.shape
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(N)[None, :, None]
    read = jnp.zeros((B, N, count + 1), bool).at[rows, heads, jnp.where(index < 0, count, index)].set(True)
    before = (columns >= 0) & (columns < own * block)  # those behind lie in no block that is read
    return before, before & ~jnp.take_along_axis(read, jnp.maximum(columns, 0) // block, axis=-1)


def _whole(x: jax.Array, axis: int, block: int, fill: int = 0) -> jax.Array:
    """Pads an axis of tokens to whole blocks."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=fill)
