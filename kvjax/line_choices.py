"""Choices of single keys and of diagonals for `kvjax.prompt_attention`: lines of the attention matrix."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.probes import ascending, important_tokens, last_probes, probe_attention
from kvjax.prompt_attention import Choice
from kvjax.segments.slots import without_rounding
from pallas_kernels.logits import Scale, factor

_ALWAYS = 30  # first columns and nearest diagonals that count as the strongest


@dataclasses.dataclass(frozen=True)
class Corner:
    """Chooses the first tokens, and the blocks that hold the nearest ones: the shape of an A.

    Attributes:
      first: tokens at the beginning.
      near: tokens before a query, itself included.
    """

    first: int = 128
    near: int = 1024

    def __call__(
        self, q, k, pos, *, block: int, window: int | None, scale: Scale | None
    ) -> tuple[jax.Array, jax.Array]:
        """See `kvjax.prompt_attention.Choice`."""
        B, T, N, _ = q.shape
        at = jnp.arange(T)
        weight = jnp.where(at < self.near, jnp.float32(T) - at, 0.0)
        blocks = _along_diagonals(jnp.broadcast_to(weight, (B, N, T)), block)
        first = ascending((at < self.first) & (pos >= 0))
        return blocks, jnp.broadcast_to(first[:, None], (B, N, T))[..., : max(self.first, 1)]


@dataclasses.dataclass(frozen=True)
class Lines:
    """Chooses the columns and the diagonals that the last queries of a prompt attend to most.

    Of the attention of the last `probes` queries, a column's sum is what a key receives, a diagonal's sum what keys at
    one distance receive. A block of keys is read where a chosen diagonal touches it, a column key by key.

    Source: Jiang et al., MInference (2024), algorithm 2.

    Attributes:
      columns: of a head, at least 30: the first 30 are always among them.
      diagonals: of a head, at least 50: the nearest 30 are always among them.
      probes: queries.
    """

    columns: int = 1000
    diagonals: int = 6096
    probes: int = 64

    def __call__(
        self, q, k, pos, *, block: int, window: int | None, scale: Scale | None
    ) -> tuple[jax.Array, jax.Array]:
        """See `kvjax.prompt_attention.Choice`."""
        T = q.shape[1]
        q, q_pos = last_probes(q, pos, self.probes)
        p = probe_attention(q, q_pos, k, pos[:, None], window=window, scale=scale)  # [B, N, W, T]
        real, at = (pos >= 0)[:, None], jnp.arange(T)
        received = jnp.where(real, without_rounding(jnp.sum(p, axis=2)), -jnp.inf)
        columns = ascending(_strongest(received, self.columns))
        apart = (q_pos - pos[:, :1])[:, None, :, None] - at  # the key that lies at each distance from a query
        by_distance = jnp.take_along_axis(p, jnp.maximum(jnp.broadcast_to(apart, p.shape), 0), axis=-1)
        diagonal = without_rounding(jnp.sum(jnp.where(apart >= 0, by_distance, 0.0), axis=2))
        chosen = _strongest(jnp.where(real, diagonal, -jnp.inf), self.diagonals)
        weight = jnp.where(chosen, jnp.maximum(diagonal, 1e-30), 0.0)
        return _along_diagonals(weight, block), columns[..., : self.columns]


@dataclasses.dataclass(frozen=True)
class PooledBlocks:
    """Chooses for each block of queries the blocks of keys with the largest product of means.

    Source: Jiang et al., MInference (2024), algorithm 3.

    Attributes:
      count: blocks of keys.
    """

    count: int = 100

    def __call__(self, q, k, pos, *, block: int, window: int | None, scale: Scale | None) -> jax.Array:
        """See `kvjax.prompt_attention.Choice`."""
        (B, T, N, H), K = q.shape, k.shape[1]
        real = (pos >= 0).astype(jnp.float32).reshape(B, -1, block)  # [B, I, block]
        number = jnp.maximum(jnp.sum(real, axis=-1), 1.0)
        q = jnp.einsum("bithx,bit->bihx", q.reshape(B, -1, block, N, H).astype(jnp.float32), real)
        k = jnp.einsum("bkjsx,bjs->bkjx", k.reshape(B, K, -1, block, H).astype(jnp.float32), real)
        q, k = q / number[..., None, None], k / number[:, None, :, None]
        logits = jnp.einsum("bikgx,bkjx->bkgij", q.reshape(B, -1, K, N // K, H), k) * factor(scale, H)
        logits = without_rounding(logits.reshape(B, N, T // block, T // block))
        at = jnp.arange(T // block)
        logits = jnp.where((at[:, None] >= at) & (real[:, None, None, :, 0] > 0), logits, -jnp.inf)
        if window is not None:
            logits = jnp.where((at[:, None] - at) * block - (block - 1) < window, logits, -jnp.inf)
        order = jnp.argsort(-logits, axis=-1, stable=True)
        return jnp.where(jnp.argsort(order, axis=-1) < self.count, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class ByPattern:
    """Lets every head choose in one of several ways. All are computed, and each head's is taken.

    Attributes:
      choices: `PromptAttention.patterns` names one of them for every head.
    """

    choices: tuple[Choice, ...]

    def __call__(self, q, k, pos, *, patterns: jax.Array, **how: Any) -> tuple[jax.Array, jax.Array]:
        """See `kvjax.prompt_attention.Choice`."""
        found = [choice(q, k, pos, **how) for choice in self.choices]
        none = jnp.full((*q.shape[:1], q.shape[2], 1), -1, jnp.int32)
        found = [of if isinstance(of, tuple) else (of, none) for of in found]
        width = max(columns.shape[2] for _, columns in found)
        mine = lambda x, i: jnp.where((patterns == i).reshape(1, -1, *(1,) * (x.ndim - 2)), x, x.dtype.type(0))
        wide = lambda x: jnp.pad(x + 1, ((0, 0), (0, 0), (0, width - x.shape[2])))  # 0: none
        blocks = jnp.stack([of for of, _ in found])
        columns = sum(mine(wide(of), i) for i, (_, of) in enumerate(found)) - 1
        blocks = jnp.take_along_axis(blocks, patterns.reshape(1, 1, -1, 1, 1), axis=0)[0]
        return blocks, columns


@dataclasses.dataclass(frozen=True)
class Important:
    """Chooses the same keys for all heads of a layer: those that the last queries make important.

    Source: He et al., ZipVL (2024), section 3.

    Attributes:
      tau: share of the attention, see `kvjax.probes.important_tokens`; 1.0: every token.
      probes: queries.
    """

    tau: float = 0.975
    probes: int = 128

    def __call__(
        self, q, k, pos, *, block: int, window: int | None, scale: Scale | None
    ) -> tuple[jax.Array, jax.Array]:
        """See `kvjax.prompt_attention.Choice`."""
        B, T, N, _ = q.shape
        q, q_pos = last_probes(q, pos, self.probes)
        p = probe_attention(q, q_pos, k, pos[:, None], window=window, scale=scale)
        columns = ascending(important_tokens(p, q_pos, pos, self.tau))
        nothing = jnp.full((B, N, T // block, T // block), -jnp.inf)  # but the block of the queries
        return nothing, jnp.broadcast_to(columns[:, None], (B, N, T))


def _strongest(x: jax.Array, count: int) -> jax.Array:
    """Marks the `count` largest of [..., T], the first 30 before all others; of equal ones the first; never -inf."""
    first = (jnp.arange(x.shape[-1]) < _ALWAYS) & (x > -jnp.inf)
    order = jnp.argsort(-jnp.where(first, jnp.inf, x), axis=-1, stable=True)
    return (jnp.argsort(order, axis=-1) < count) & (x > -jnp.inf)


def _along_diagonals(weight: jax.Array, block: int) -> jax.Array:
    """[B, N, T] what each distance is worth -> [B, N, I, I]: of a block the sum over the diagonals that touch it."""
    T = weight.shape[-1]
    count = T // block
    runs = jnp.pad(weight, ((0, 0), (0, 0), (block - 1, 1)))  # entry j is of distance j - (block - 1)
    runs = runs.reshape(*weight.shape[:2], count + 1, block)
    total = jnp.sum(runs[:, :, :-1], axis=-1) + jnp.sum(runs[:, :, 1:, :-1], axis=-1)  # [B, N, I], by blocks apart
    at = jnp.arange(count)
    worth = jnp.take(total, jnp.maximum(at[:, None] - at, 0), axis=-1)
    return jnp.where(worth > 0, worth, -jnp.inf)
