"""Choices of blocks of keys for `kvjax.prompt_attention`: by antidiagonals of the logits, by place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.segments.slots import without_rounding
from pallas_kernels.logits import Scale, capped, factor


@dataclasses.dataclass(frozen=True)
class Antidiagonals:
    """Chooses the fewest blocks that hold a share of the attention which antidiagonals promise.

    In every tile of `stride` x `stride` tokens the logits of one antidiagonal are averaged; a softmax over the tiles
    of a tile's queries, summed over the tiles of a block, is the block's share. The first block and the block of the
    queries are always read, then those with the largest shares until `tau` of the sum is reached.

    Source: Xu et al., XAttention (2025), section 2.

    Attributes:
      stride: tokens of a tile, which divide a block.
      tau: share of the attention; 1.0: every block.
    """

    stride: int = 8
    tau: float = 0.9

    def __call__(self, q, k, pos, *, block: int, window: int | None, scale: Scale | None) -> jax.Array:
        """See `kvjax.prompt_attention.Choice`."""
        (B, T, N, H), K, S = q.shape, k.shape[1], self.stride
        if block % S:
            raise ValueError(f"stride must divide a block of {block} tokens, got {S}.")
        count, tiles = T // block, T // S
        if self.tau >= 1.0:
            return jnp.zeros((B, N, count, count), jnp.float32)
        real = pos >= 0
        q = jnp.where(real[..., None, None], q, 0).reshape(B, count, block // S, S, K, N // K, H)[:, :, :, ::-1]
        q = q.transpose(1, 0, 4, 5, 2, 3, 6).reshape(count, B, K, N // K, block // S, S * H)
        k = jnp.where(real[:, None, :, None], k, 0).reshape(B, K, tiles, S * H)
        there = real[:, ::S]  # [B, tiles]: a tile holds a token if it holds its first
        at = jnp.arange(tiles)

        def shares(of):  # of a block of queries
            q, start = of
            logits = jnp.einsum("bkgtx,bksx->bkgts", q, k, preferred_element_type=jnp.float32)
            logits = capped(logits * (factor(scale, H) / S), scale)
            here = start + jnp.arange(block // S)
            apart = here[:, None] - at
            seen = (apart >= 0) & there[:, None, None, None]
            if window is not None:
                seen &= apart * S - (S - 1) < window
            logits = jnp.where(seen, logits, -jnp.inf)
            shared = jnp.where(jnp.any(seen, axis=-1, keepdims=True), jax.nn.softmax(logits, axis=-1), 0.0)
            shared = jnp.where(jnp.take(there, here, axis=1)[:, None, None, :, None], shared, 0.0)
            return jnp.sum(shared.reshape(B, N, block // S, count, block // S), axis=(2, 4))

        share = jax.lax.map(shares, (q, jnp.arange(0, tiles, block // S)))  # [I, B, N, I]
        return self._enough(without_rounding(jnp.moveaxis(share, 0, 2)))

    def _enough(self, share: jax.Array) -> jax.Array:
        """Leaves of f32[B, N, I, I] shares the largest that together reach tau, and those always read at inf."""
        at = jnp.arange(share.shape[-1])
        always = (at == 0) | (at[:, None] == at)
        order = jnp.argsort(jnp.where(always, -jnp.inf, -share), axis=-1, stable=True)
        largest = jnp.take_along_axis(share, order, axis=-1)
        before = jnp.cumsum(largest, axis=-1) - largest
        enough = before < self.tau * jnp.sum(share, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(enough, jnp.argsort(order, axis=-1), axis=-1) & (share > 0)
        return jnp.where(always, jnp.inf, jnp.where(chosen, share, -jnp.inf))


@dataclasses.dataclass(frozen=True)
class Nearby:
    """Chooses the blocks of the same group, of a few groups before it and of the first tokens.

    The group that holds a row's last token reads everything: a question lies there.

    Source: Qin et al., Video-XL-2 (2025), without what is said of frames.

    Attributes:
      group: blocks of a group.
      previous: groups before it that it reads.
      first: blocks at the beginning that everything reads.
    """

    group: int = 8
    previous: int = 1
    first: int = 1

    def __call__(self, q, k, pos, *, block: int, window: int | None, scale: Scale | None) -> jax.Array:
        """See `kvjax.prompt_attention.Choice`."""
        B, T, N, _ = q.shape
        at = jnp.arange(T // block)
        near = at // self.group >= at[:, None] // self.group - self.previous
        last = jnp.maximum(jnp.sum(pos >= 0, axis=1) - 1, 0) // block // self.group
        asks = at // self.group == last[:, None]  # [B, I]
        chosen = near | (at < self.first) | asks[..., None]
        worth = jnp.where(at < self.first, jnp.inf, at.astype(jnp.float32))  # the nearest, where some are cut
        worth = jnp.where(chosen, worth, -jnp.inf)
        return jnp.broadcast_to(worth[:, None], (B, N, *worth.shape[1:]))
